"""Clients on other machines: `FederatedStrategy` on both ends of an engine that carries messages."""
