"""Incidents: each row of docs/incidents.md happens in a real deployment, is found, and is mended."""
