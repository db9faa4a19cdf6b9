"""Testing: a pytest plugin for test suites of projects that use this library.

Load it with `pytest -p openagents_worker.testing`.

```python
def test_the_assistant_answers(agents_worker, scripted_model):
    scripted_model.will_say({"tool_calls": [{"name": "calc", "arguments": {"expression": "17*23"}}]}, "391")
    worker = agents_worker([{"id": "assistant", "tools": [{"id": "calc", "type": "calc"}]}])

    assert worker.run("assistant", "What is 17*23?").final_output == "391"
```
"""

# Named here, not imported: the model server can be used without pytest.
pytest_plugins = ["openagents_worker.testing.fixtures"]
