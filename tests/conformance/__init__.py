"""One suite per protocol, run over every built-in type of the registry: a type that is added is run by it.

The other suites of this kind are where their parts are tested: tools in `unit/tools/test_builtin.py`,
patterns in `runtime/test_patterns.py`, the wire formats of models in `unit/llm/test_wire_formats.py`.
"""
