// Names in tables and headings may break after a mark in them, and not in the middle of a word.
document.addEventListener("DOMContentLoaded", () => {
  const code = document.querySelectorAll(".bd-article :is(td, th, h1, h2, h3) code");
  const texts = [...code].flatMap((element) => {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) found.push(walker.currentNode);
    return found;
  });
  for (const text of texts) {
    const parts = text.data.split(/(?<=[_(.,=/])(?=[^\s.)])/);
    if (parts.length > 1) text.replaceWith(...parts.flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part])));
  }
});
