"""What a block of the documentation takes for granted: `<!-- test: prelude=NAME -->` names a file here.

A prelude is executed before the block, in the same namespace. Its `check()` is called after it.
"""
