"""Arrays and settings from and to other libraries."""
