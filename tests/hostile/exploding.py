"""A plugin module whose import fails with an exception that contains every secret and control sequence."""

from tests.hostile.planted import CONTROL, SECRETS

raise RuntimeError("\n".join([*(secret.text for secret in SECRETS[:-1]), *CONTROL.values()]))
