"""The fundamentals. Read these tests in order to learn what the system does.

The tests use a real worker process and the public interface of a producer. The model is a local HTTP server
whose replies each test defines. The agents and tools belong to a small shop (conftest.py, shop.py).
"""
