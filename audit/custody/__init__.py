"""The chain of custody of a report: what it rests on, by hash; who made it, by which command, when; and a signature.

``record`` hashes the rows of an audit, ``statement`` is the manifest, ``keep`` writes it beside its page, ``signing``
puts it into a signed envelope, ``check`` compares all of it with what is there now, and ``again`` runs the audit once
more.
"""
