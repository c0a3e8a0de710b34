"""Compressed modules as files, and their structure as text."""
