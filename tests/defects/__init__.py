"""The original SDK's defects: a table of what is right in this library, and tests that hold it."""
