"""Support: what tests of several folders share. Each module says in its first lines what is real in it."""
