"""Engines run the stages of an audit. ``local`` runs them in this process."""
