"""Models on memristor crossbars: which weight lies in which cell, and what the arrays answer."""
