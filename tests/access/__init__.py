"""Access: each kind of process as a Redis user of its own, with the rights of its file in `config/acl/`."""
