"""People look at rows: a local page where each is accepted, fixed or dropped. See docs/data_review.md.

rows.py        a source's rows as people see them, images unread       votes.py   what judges said
check.py       the strict parser and answer equality                   decisions.py  the append-only file
desk.py        what a page may ask and say, without any HTTP           written.py the reviewed set
server.py      127.0.0.1 only, a token in the address                  page.py    the document
"""
