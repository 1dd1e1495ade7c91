"""Pictures of a plan: one page in HTML, or one layer in SVG. From facts to geometry to markup, each a pure function.

No file is read or written here, and nothing is computed about a plan that `plan_table` says already. Names in a plan
may be anyone's: `markup.tag` is the one place where text becomes markup, and it escapes all of it.
"""
