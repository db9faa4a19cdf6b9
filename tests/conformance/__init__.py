"""One suite per protocol, run over every built-in type of the registry: a type that is added is run by it.

A policy is an executor here (`filesystem_aware`, `network_aware`, `composite`). The other suites of this kind
are where their parts are tested: patterns in `runtime/test_patterns.py`, what a tool declares and refuses in
`unit/tools/test_builtin.py`, the wire formats of models in `unit/llm/test_wire_formats.py`.
"""
