"""The tests of modelcache, and what they need in common."""
