"""Error codes: each is caused here in the way that `docs/errors.md` describes."""
