"""What a person reads of an audit: the collected facts, as a page, as JSON and in the terminal."""

from audit.report.facts import AuditFacts, collect
from audit.report.page import write_page

__all__ = ["AuditFacts", "collect", "write_page"]
