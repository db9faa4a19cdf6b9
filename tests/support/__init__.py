"""Support: what tests of several folders share. Each module says in its first line what is real in it.

A test runs in one of four worlds, the smallest that can show what it claims:

scripts     `scripts.Hand` calls the scripts of the store as a worker does, one call a step. Real: Redis.
            `script_calls` builds the calls with short arguments.
runner      `runner` executes runs in the process of the test, one by one. Real: Redis, all of `runtime`.
deployment  `deployment.installed` starts Redis, a worker process and a model server; all of it is real.
            `supervised_deployment.World` has several workers, kills them, and starts new ones.
            `development.developing` is the command `dev`, with commands of a user beside it.
proxy       `proxy.Lines` is a connection to a real Redis that a test holds, cuts or changes.
            `lossy_proxy` drops replies; `command_proxy` counts commands and breaks connections between them.

The rest: `waiting` (wait for a condition, never for a duration) · `clocks` (a loop whose time is set) ·
`guards` and `blocking` (rules that are checked in every test) · `diary` (what tools really did) ·
`stored_events` · `hostile_server` (HTTP responses that are meant to harm) · `refused_schemas` ·
`processes` and `fork_server` (how processes start) · `cpu_report` (what tests cost) ·
`sampling` (short editions of large tables).
"""
