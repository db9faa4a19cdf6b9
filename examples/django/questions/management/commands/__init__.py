"""The management commands: `manage.py submit_missing`."""
