"""A page to look at: a picture, a question, and what a recipe keeps of them. Needs the extra ``studio``.

``menus`` and ``bench`` compute what is seen, ``drawing`` and ``fragments`` draw it; none of them knows the page.
``live`` crosses an emulated link. ``page`` and ``crossing`` (NiceGUI) are on top, ``app`` serves them.
"""
