
drawHeader();
drawCurves();
drawFilters();
draw();
