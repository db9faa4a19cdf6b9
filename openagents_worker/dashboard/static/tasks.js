// Links the rows of Flower's page of tasks to the pages of their runs.
(function () {
    "use strict";

    var runs = document.currentScript ? document.currentScript.getAttribute("data-runs") : null;
    var table = document.getElementById("tasks-table");
    if (!runs || !table) {
        return;
    }

    function link(cell) {
        var found = /^(agent=\S+ session=\S+ )run=(\S+)$/.exec(cell.textContent);
        if (!found || cell.querySelector("a")) {
            return;
        }
        var run = document.createElement("a");
        run.href = runs + "?id=" + encodeURIComponent(found[2]);
        run.textContent = "run=" + found[2];
        cell.textContent = found[1];
        cell.appendChild(run);
    }

    function linkAll() {
        table.querySelectorAll("tbody td").forEach(link);
    }

    new MutationObserver(linkAll).observe(table, {childList: true, subtree: true});
    linkAll();
}());
