"""Doors: how sessions are reached over WebSocket, HTTP, openpi's protocol and ZeroMQ."""
