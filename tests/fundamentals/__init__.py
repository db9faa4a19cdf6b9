"""The fundamentals: read these tests in their order, and you know what this system does.

They speak to a real worker process through what a producer imports. The model is a server that says what the
test tells it to; the agents and their tools are those of a small shop (conftest.py, shop.py).
"""
