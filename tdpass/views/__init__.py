"""What the terminal and the HTML report are made of.

Figures as people read them, text tables, pieces of markup.
"""
