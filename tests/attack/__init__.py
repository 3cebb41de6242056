"""A campaign of random attacks on a running service, while quiet callers measure what it does to them.

campaign      starts the attackers and the quiet callers, and measures the service
connections   connections in every state, chunkings, heads, dropped requests
bodies        bodies that are compressed, deep, or refused
media         pictures and clips with random tables, packets and damage
"""
