"""The deployment has an agent `support`; afterwards the run has an answer."""


def check():
    assert handle.wait(timeout=60).final_output == "17*23 is 391."
