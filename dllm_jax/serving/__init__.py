"""Serving: requests that join and leave one program, by OpenAI's conventions."""
