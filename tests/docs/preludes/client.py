"""What a program that asks for runs by their ids has imported."""

from openagents_worker import Client
