"""Talking to servers that are not trusted: one bounded HTTP client, and the types of what they may answer."""
