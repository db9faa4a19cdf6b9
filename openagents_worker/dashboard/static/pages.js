// Keeps our pages current. Without this script they work, but must be reloaded.
(function () {
    "use strict";

    var MAX_REPLY_CHARS = 20000;  // of a streamed reply on the page; its end is kept
    var LEAST_PAUSE_MS = 400;  // between two refreshes of a run
    var FOLLOW_AGAIN_MS = 3000;  // after the server has refused to send the events of a run
    var busy = false;
    var currentAt = new Date();

    // --- whether the page is current -------------------------------------------------------------------

    function isCurrent() {
        currentAt = new Date();
        document.getElementById("stale").hidden = true;
    }

    function isStale(error) {
        var notice = document.getElementById("stale");
        var text = "This page shows the state at " + currentAt.toLocaleTimeString() + ". It cannot be refreshed: " + error.message + ".";
        if (notice.textContent !== text) {
            notice.textContent = text;
        }
        notice.hidden = false;
    }

    // --- parts of the page that are replaced by their current form ------------------------------------

    function isUsed(part) {
        // A field with text, or the keyboard focus, must not vanish under the user's hands.
        if (part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) {
            return true;
        }
        return Array.prototype.some.call(part.querySelectorAll("input:not([type=hidden]), textarea"), function (field) {
            return field.value !== field.defaultValue;
        });
    }

    function replace(part, fresh) {
        if (part.innerHTML === fresh.innerHTML && part.className === fresh.className) {
            return;
        }
        var open = Array.prototype.map.call(part.querySelectorAll("details[id][open]"), function (each) {
            return each.id;
        });
        var closed = Array.prototype.map.call(part.querySelectorAll("details[id]:not([open])"), function (each) {
            return each.id;
        });
        var focused = part.contains(document.activeElement) ? place(part, document.activeElement) : null;
        var top = part.scrollTop;
        part.className = fresh.className;
        part.innerHTML = fresh.innerHTML;
        part.scrollTop = top;
        part.querySelectorAll("details[id]").forEach(function (each) {
            each.open = open.indexOf(each.id) >= 0 || (each.open && closed.indexOf(each.id) < 0);
        });
        var target = focused === null ? null : focusable(part)[focused];
        if (target) {
            target.focus({preventScroll: true});
        }
    }

    function focusable(part) {
        return part.querySelectorAll("a[href], button, summary, input:not([type=hidden]), textarea, select, [tabindex]");
    }

    function place(part, element) {
        return Array.prototype.indexOf.call(focusable(part), element);
    }

    function refresh() {
        if (busy) {
            return Promise.resolve();
        }
        busy = true;
        return fetch(window.location.href, {credentials: "same-origin"}).then(function (answer) {
            if (!answer.ok) {
                throw new Error("the server answered " + answer.status);
            }
            return answer.text();
        }).then(function (text) {
            var page = new DOMParser().parseFromString(text, "text/html");
            document.querySelectorAll("[data-live]").forEach(function (part) {
                var fresh = page.getElementById(part.id);
                if (fresh && !isUsed(part)) {
                    replace(part, fresh);
                }
            });
            document.title = page.title;
            isCurrent();
        }).catch(isStale).finally(function () {
            busy = false;
        });
    }

    function keepCurrent(part) {
        var pause = Number(part.getAttribute("data-live"));
        if (!pause) {
            return;
        }
        window.setInterval(function () {
            if (document.visibilityState === "visible") {
                refresh();
            }
        }, pause);
    }

    document.querySelectorAll("[data-live]").forEach(keepCurrent);

    // --- a run: its events as they come --------------------------------------------------------------

    var stream = document.getElementById("run-stream");
    if (!stream || stream.getAttribute("data-over") === "yes") {
        return;
    }
    var reply = document.getElementById("reply");
    var replyText = document.getElementById("reply-text");
    var waiting = null;
    var lastId = "";

    function refreshSoon() {
        if (waiting === null) {
            waiting = window.setTimeout(function () {
                waiting = null;
                if (busy) {
                    refreshSoon();
                } else {
                    refresh();
                }
            }, LEAST_PAUSE_MS);
        }
    }

    function onPiece(message) {
        var payload = JSON.parse(message.data).payload;
        if (payload.kind && payload.kind !== "text") {
            return;
        }
        var text = payload.offset === 0 ? payload.text : replyText.textContent + payload.text;
        replyText.textContent = text.slice(-MAX_REPLY_CHARS);
        reply.hidden = false;
        replyText.scrollTop = replyText.scrollHeight;
    }

    function onEvent(message) {
        lastId = message.lastEventId || lastId;
        refreshSoon();
    }

    function onReplyEnd(message) {
        reply.hidden = true;
        replyText.textContent = "";
        onEvent(message);
    }

    function follow() {
        var url = stream.getAttribute("data-url");
        var source = new EventSource(lastId ? url.replace(/after=\d+$/, "after=" + lastId) : url);
        source.addEventListener("llm.delta", onPiece);
        (stream.getAttribute("data-names") || "").split(" ").forEach(function (name) {
            if (name && name !== "llm.delta") {
                source.addEventListener(name, /^llm\.(succeeded|failed)$|^run\./.test(name) ? onReplyEnd : onEvent);
            }
        });
        source.addEventListener("end", function () {
            source.close();
            reply.hidden = true;
            refreshSoon();
        });
        source.addEventListener("open", function () {
            if (!document.getElementById("stale").hidden) {
                refreshSoon();
            }
        });
        source.addEventListener("error", function () {
            refreshSoon();
            // After a lost connection the browser connects again, but never after a refusal, as while Redis is away.
            if (source.readyState === EventSource.CLOSED) {
                window.setTimeout(follow, FOLLOW_AGAIN_MS);
            }
        });
    }

    follow();
}());
