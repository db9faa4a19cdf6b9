"""Commands of the product: `manage.py submit_missing`."""
