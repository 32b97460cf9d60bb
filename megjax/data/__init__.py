"""Captioned pictures: the procedural `scenes`, folders, the hub; crops of photographs."""
