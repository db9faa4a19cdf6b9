"""Testing: what a product's own suite needs. As a pytest plugin: `pytest -p openagents_worker.testing`.

```python
def test_the_assistant_answers(agents_worker, scripted_model):
    scripted_model.will_say({"tool_calls": [{"name": "calc", "arguments": {"expression": "17*23"}}]}, "391")
    worker = agents_worker([{"id": "assistant", "tools": [{"id": "calc", "type": "calc"}]}])

    assert worker.run("assistant", "What is 17*23?").final_output == "391"
```
"""

# Named, not imported: who uses the model server alone needs no pytest.
pytest_plugins = ["openagents_worker.testing.fixtures"]
