"""Running statistics of whole models: measured again, merged, corrected."""
