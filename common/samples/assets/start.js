
drawHeader();
drawCurves();
drawFilters();
readAddress();
readPlace();
draw();
keepPlace();
returnToPlace();
followRun();

document.querySelectorAll('a[href^="#"]').forEach((link) => link.addEventListener("click", (event) => {
  event.preventDefault();  // the address says what is shown, not where
  const target = document.querySelector(link.getAttribute("href"));
  target.focus();
  target.scrollIntoView();
}));
