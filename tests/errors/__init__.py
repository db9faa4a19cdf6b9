"""Error codes: each is met here, where its meaning in `docs/errors.md` says."""
