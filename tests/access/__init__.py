"""Access: each kind of process as a separate Redis user, with the rights of its file in `config/acl/`."""
