"""The functions, and the mathematics behind them and the layers."""
