"""`python -m openagents_worker.cli`: the same as `openagents-worker`."""

from openagents_worker.cli import main

if __name__ == "__main__":
    main()
