"""What an operator types: compose services, the Procfile, make. Each command is executed as it is written."""
