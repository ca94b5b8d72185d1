"""`burnish doctor`: what this machine has, what that means for a run, and what is wrong.

facts.py    what is known of a machine: plain values, as `--json` prints them and as tests make them up
probes.py   one function for each part of a machine, which survives whatever is not there
rules.py    a table of rules: facts → a sentence that says what it means and what to do
show.py     all of it for a person, or as JSON
"""
