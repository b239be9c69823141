"""kvferry inside other people's tools. Each module needs the tool it is named after."""
