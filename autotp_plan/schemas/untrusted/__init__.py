"""What comes from strangers, held within limits: files that are opened without waiting, patterns that end, text that a
terminal may show.

Not here: what a document may contain (`schemas.documents` and the schemas).
"""
