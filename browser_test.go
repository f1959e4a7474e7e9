package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// These tests have the last word on what a browser does: they drive Chromium with the DevTools protocol. It is spoken
// over a pair of pipes, --remote-debugging-pipe, which needs no WebSocket. Each message is JSON that ends in a NUL.

// A site is what a browser sees: one origin, with a host's gateway for the streams and its backend for the rest.
type site struct {
	host
	URL string
}

// openSite starts a site, with env added to the environment of its host, and opens its page.
func openSite(t *testing.T, env ...string) (*site, *tab) {
	s := startSite(t, env...)
	return s, startBrowser(t).open(s.URL + "/")
}

func startSite(t *testing.T, env ...string) *site {
	s := &site{host: startHost(t, append(env, "RETRY_MILLISECONDS=100", "API_TOKEN=")...)}
	proxyTo := func(p *process) http.Handler {
		target, _ := url.Parse(p.URL)
		return &httputil.ReverseProxy{
			FlushInterval: -1,
			Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
			ErrorLog:      log.New(io.Discard, "", 0), // streams break: that is the test
			// As a proxy should: an answer with another status would end the EventSource for good.
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { panic(http.ErrAbortHandler) },
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/", proxyTo(s.backend))
	mux.Handle("/api/sse/", proxyTo(s.gateway))
	mux.HandleFunc("/report.csv", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Disposition", "attachment")
	})
	s.URL = serveTest(t, mux).URL
	return s
}

// post posts to the backend, as a script would.
func (s *site) post(t *testing.T, path, body string) {
	t.Helper()
	mustAsk(t, "POST", s.backend.URL+path, body)
}

func TestBrowserPage(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t)

	// A task survives the gateway.
	tab.run(`const form = document.querySelector("#demo-form");
		form.elements.steps.value = 30; form.elements.delay.value = 0.1;
		document.querySelector("#start-demo").click()`)
	tab.wait(`document.querySelectorAll("#tasks li").length > 5`)
	site.gateway.kill(t)
	tab.wait(`document.querySelector("#tasks tbody[data-state=reconnecting]")`)
	site.gateway.restart(t)
	tab.wait(`document.querySelector("#tasks tbody[data-status=completed][data-state=closed]")`)
	want := []string{"task_started null"}
	for step := 1; step <= 30; step++ {
		value, _ := json.Marshal(float64(step) / 30)
		want = append(want, fmt.Sprintf(`progress_update {"text":"step %d of 30","value":%s}`, step, value))
	}
	tab.wantEvents(t, "#tasks tbody", append(want, `task_completed {"message":"Demo","steps":30}`)...)

	// A deployment reaches the page.
	site.post(t, "/api/deployments/version", `{"version":"browser-2","changelog":"faster"}`)
	const banner = `!document.querySelector("#version-banner").hidden && document.querySelector("#version-banner").textContent.includes(%q)`
	tab.wait(fmt.Sprintf(banner, "browser-2"))
	tab.wait(`document.querySelector("#version-current").textContent == "browser-2"`)

	// A page that is loaded afterwards has that version, and shows a banner only for the next one.
	second := tab.browser.open(site.URL + "/")
	second.wait(`document.querySelector("#version-name").textContent == "browser-2"`)
	second.wait(`document.querySelector("#version-banner").hidden`)
	site.post(t, "/api/deployments/version", `{"version":"browser-3"}`)
	second.wait(fmt.Sprintf(banner, "browser-3"))
}

// A link to a download or to mailto: makes the browser announce that the page is being left, and the page closes its
// streams. But then the page stays, so it opens them again where they were.
func TestBrowserPageThatStays(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t)
	site.post(t, "/api/tasks", oneExternal)
	tab.run(`window.left = 0; addEventListener("beforeunload", () => left++)`)
	tab.follow("t")
	open := `document.querySelectorAll("[data-state=open]").length == 2 && document.querySelectorAll("#tasks li").length == %d`
	tab.wait(fmt.Sprintf(open, 1)) // the state of the stream is shown at the top and at the task
	for i, link := range []string{"/report.csv", "mailto:somebody@example.com"} {
		tab.run(`location.href = "` + link + `"`)
		tab.wait(fmt.Sprintf(`left == %d && document.querySelector("#connection").dataset.state == "reconnecting"`, i+1))
		site.post(t, "/api/tasks/t/progress", `{"value":0.5}`)
		tab.wait(fmt.Sprintf(open, i+2))
	}
	site.post(t, "/api/tasks/t/complete", `{"result":1}`)
	tab.wait(`document.querySelector("#tasks tbody[data-status=completed][data-state=closed]")`)
	tab.wantEvents(t, "#tasks tbody", "task_started null", `progress_update {"text":"","value":0.5}`,
		`progress_update {"text":"","value":0.5}`, "task_completed 1")
	site.post(t, "/api/deployments/version", `{"version":"browser-2"}`)
	tab.wait(`!document.querySelector("#version-banner").hidden`)
}

// A browser has six connections over HTTP/1.1 for all its tabs together, so each page has one stream.
func TestBrowserManyTasks(t *testing.T) {
	t.Parallel()
	site := startSite(t)
	browser := startBrowser(t)
	tabs := []*tab{browser.open(site.URL + "/"), browser.open(site.URL + "/")}
	count := func(selector string, n int) string {
		return fmt.Sprintf("document.querySelectorAll(`%s`).length == %d", selector, n)
	}
	for _, tab := range tabs { // each starts ten tasks, and also follows those of the other
		tab.run(`for (let i = 0; i < 10; i++) document.querySelector("#start-external").click()`)
	}
	var ids []string
	for _, tab := range tabs {
		tab.call(tab.session, "Page.bringToFront", nil, &struct{}{}) // otherwise it does not ask for the list
		tab.wait(count("#tasks tbody[data-status=running][data-state=open]", 20))
		tab.wait(count("#tasks li", 20))
		tab.run(`fetch("/healthz").then(() => window.answered = true)`) // no task has ended by then
		tab.wait(`window.answered`)
		tab.get(`[...document.querySelectorAll("#tasks tbody")].map(row => row.dataset.taskId)`, &ids)
	}
	want := []string{"task_started null"}
	report := func() {
		step := len(want)
		for _, id := range ids {
			site.post(t, "/api/tasks/"+id+"/progress", fmt.Sprintf(`{"text":"%d","value":0.5}`, step))
		}
		want = append(want, fmt.Sprintf(`progress_update {"text":"%d","value":0.5}`, step))
	}
	check := func() {
		t.Helper()
		for _, tab := range tabs {
			tab.wait(count("#tasks tbody[data-status=completed][data-state=closed]", len(ids)))
			for _, id := range ids {
				tab.wantEvents(t, fmt.Sprintf(`tbody[data-task-id="%s"]`, id), want...)
			}
		}
	}
	report()
	report()
	for _, id := range ids {
		site.post(t, "/api/tasks/"+id+"/complete", `{"result":"good"}`)
	}
	want = append(want, `task_completed "good"`)
	check()
	// A page that is loaded again has the same events when its logs are opened.
	loaded := func() (id string) { // of what the tab shows; asks nothing of a page that is about to go
		var tree struct {
			FrameTree struct{ Frame struct{ LoaderID string } }
		}
		tabs[0].call(tabs[0].session, "Page.getFrameTree", nil, &tree)
		return tree.FrameTree.Frame.LoaderID
	}
	old := loaded()
	tabs[0].run(`setTimeout(() => location.reload())`)
	eventually(t, browserPatience, "a reload", func() bool { return loaded() != old })
	tabs[0].wait(count("#tasks tbody[data-status=completed]", len(ids)))
	tabs[0].run(`document.querySelectorAll("#tasks .open-log").forEach(button => button.click())`)
	tabs[0].wait(count("#tasks li", len(ids)*len(want)))
	check()
}

// The table shows every task, whoever started it, and its progress, without a click.
func TestBrowserTable(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t)
	tab.wait(`!document.querySelector("#empty").hidden`)
	row := func(id string) string { return "document.querySelector(`[data-task-id=" + id + "]`)" }
	says := func(id, part, want string) {
		t.Helper()
		tab.wait(fmt.Sprintf("%s?.querySelector(`%s`).textContent == `%s`", row(id), part, want))
	}
	external := func(id string) {
		site.post(t, "/api/tasks", `{"type":"external","params":{"task_id":"`+id+`","title":"Task `+id+`"}}`)
	}
	looked := func() { tab.run(`dispatchEvent(new Event("focus"))`) } // otherwise the page asks only every few seconds
	for _, id := range []string{"a", "b", "c"} {
		external(id)
		if id != "a" {
			looked()
		}
		says(id, ".open-log", "Task "+id)
		says(id, ".badge", "running")
	}
	tab.want(`[...document.querySelectorAll("#tasks tbody")].map(row => row.dataset.taskId).join("")`, "cba", "the order of the rows")
	site.post(t, "/api/tasks/a/progress", `{"text":"a third","value":0.33}`)
	says("a", ".text", "a third")
	says("a", ".percent", "33 %")
	site.post(t, "/api/tasks/b/fail", `{"error":"disk full"}`)
	says("b", ".badge", "failed")
	says("b", ".text", "disk full")
	tab.run(row("c") + `.querySelector(".act").click()`)
	says("c", ".badge", "cancelled")

	// A filter hides other rows, including those that change later.
	filter := func(status string, shown ...string) {
		t.Helper()
		tab.run("document.querySelector(`#filter [value=" + status + "]`).click()")
		tab.wait("[...document.querySelectorAll(`#tasks tbody:not([hidden])`)].map(row => row.dataset.taskId).join() == `" + strings.Join(shown, ",") + "`")
	}
	filter("failed", "b")
	filter("cancelled", "c")
	filter("completed")
	site.post(t, "/api/tasks/a/complete", `{"result":1}`)
	filter("completed", "a")
	filter("all", "c", "b", "a")

	// One key moves the focus to the next row, and another opens the log.
	tab.want(`document.querySelectorAll("#tasks .log:not([hidden])").length`, 0, "open logs before any click")
	tab.run(row("b") + `.querySelector(".open-log").focus()`)
	for _, key := range []string{"ArrowDown", "Enter"} {
		press := map[string]any{"type": "keyDown", "key": key, "code": key}
		if key == "Enter" {
			press["text"], press["windowsVirtualKeyCode"] = "\r", 13
		}
		tab.call(tab.session, "Input.dispatchKeyEvent", press, &struct{}{})
	}
	tab.wait(row("a") + `.querySelector(".log").getClientRects().length == 1`)
	tab.wantEvents(t, "[data-task-id=a]", "task_started null", `progress_update {"text":"a third","value":0.33}`, "task_completed 1")

	// While the pointer moves, no row moves under it.
	tab.run(`window.moving = setInterval(() => document.querySelector("#tasks").dispatchEvent(new PointerEvent("pointermove")), 50);
		window.lists = 0;
		const ask = fetch;
		window.fetch = async (...args) => { const answer = await ask(...args); lists++; return answer; }`)
	external("d")
	looked()
	tab.wait(`lists > 0`)
	tab.run(`setTimeout(() => window.waited = true, 500)`)
	tab.wait(`window.waited`)
	tab.want(`document.querySelectorAll("#tasks tbody").length`, 3, "rows under a moving pointer")
	tab.run(`clearInterval(moving)`)
	says("d", ".badge", "running")

	// A deleted task disappears, whether it was deleted here or elsewhere.
	tab.run(row("b") + `.querySelector(".act").click()`)
	mustAsk(t, "DELETE", site.backend.URL+"/api/tasks/c", "")
	looked()
	tab.wait(`[...document.querySelectorAll("#tasks tbody")].map(row => row.dataset.taskId).join() == "d,a"`)
}

// A page that loses its stream to another goes on with a new request_id: a request of its own may have been overtaken
// by a later one.
func TestBrowserReplaced(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t)
	site.post(t, "/api/tasks", oneExternal)
	tab.follow("t")
	tab.wait(`document.querySelectorAll("#tasks tbody[data-state=open] li").length == 1`)
	var requestID string
	tab.get(`document.querySelector("#request-id").textContent`, &requestID)
	openEventSource(t, site.URL+"/api/sse/stream?request_id="+requestID)
	tab.wait(`document.querySelector("#request-id").textContent != "` + requestID + `"`)
	tab.wait(`document.querySelectorAll("#tasks tbody[data-state=open] li").length == 1`)
	site.post(t, "/api/tasks/t/complete", `{"result":1}`)
	tab.wait(`document.querySelector("#tasks tbody[data-status=completed][data-state=closed]")`)
	tab.wantEvents(t, "#tasks tbody", "task_started null", "task_completed 1")
}

// A page follows the newest 50 tasks, and others when a place becomes free.
func TestBrowserTooManyTasks(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t)
	for i := range maxPageTasks + 2 {
		site.post(t, "/api/tasks", fmt.Sprintf(`{"type":"external","params":{"task_id":"t%d"}}`, i))
	}
	state := `document.querySelectorAll("#tasks tbody[data-state=%s]").length == %d`
	tab.wait(fmt.Sprintf(state+" && "+state, "open", maxPageTasks, "waiting", 2))
	// The task with the open log comes first. The one that had to make room for it comes back with all its events.
	openLog := `document.querySelector("[data-task-id=t0] .open-log").click()`
	tab.run(openLog)
	tab.wait(`document.querySelectorAll("[data-task-id=t0][data-state=open] li").length == 1`)
	tab.wait(`document.querySelector("[data-task-id=t2]").dataset.state == "waiting"`)
	tab.run(openLog)
	tab.wait(`document.querySelectorAll("[data-task-id=t2][data-state=open] li").length == 1`)
	tab.wait(`document.querySelector("[data-task-id=t0]").dataset.state == "waiting"`)
	site.post(t, "/api/tasks/t0/complete", `{"result":0}`)
	for i := range 2 {
		site.post(t, fmt.Sprintf("/api/tasks/t%d/complete", i+2), `{"result":1}`)
	}
	tab.wait(fmt.Sprintf(state+" && "+state, "open", maxPageTasks-1, "closed", 3))
	tab.run(openLog) // the task may have ended while its log was not followed
	tab.wait(`document.querySelectorAll("[data-task-id=t0] li").length == 2`)
	tab.wait(`document.querySelectorAll("[data-task-id=t1] li").length == 1`)
	for i := range maxPageTasks + 2 {
		want := []string{"task_started null", "task_completed 1"}
		switch i {
		case 0:
			want[1] = "task_completed 0"
		case 2, 3:
		default:
			want = want[:1]
		}
		tab.wantEvents(t, fmt.Sprintf(`#tasks tbody[data-task-id="t%d"]`, i), want...)
	}
}

// While a page changes to another set of tasks it has two streams, but gets each event only once.
func TestBrowserChange(t *testing.T) {
	t.Parallel()
	queries := make(chan string, 10)
	second := make(chan bool)
	server := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/stream":
		case r.URL.Query().Get("task_id") == "a":
			queries <- r.URL.RawQuery
			streamThat("event: connection_open\ndata: {}\nid: a-0\n\nevent: task_event\ndata: 1\nid: a-1\n\n", false)(w, r)
			http.NewResponseController(w).Flush()
			<-second
			streamThat("event: task_event\ndata: 2\nid: a-2\n\nevent: connection_close\ndata: {}\nid: close\n\n", true)(w, r)
		default:
			queries <- r.URL.RawQuery
			close(second)
			time.Sleep(200 * time.Millisecond) // gives the older stream time to be heard
			streamThat("event: connection_open\ndata: {}\nid: a-1.b-0\n\nevent: task_event\ndata: 2\nid: a-2.b-0\n\n", true)(w, r)
		}
	}))
	tab := startBrowser(t).open(server.URL + "/")
	tab.run(pageClient(t) + `window.got = [];
		window.stream = openStream("/stream?task_id=a", { task_event: e => got.push(e.data),
			connection_close: () => got.push("end"), lost: () => got.push("lost") })`)
	tab.wait(`got.join() == "1"`)
	tab.run(`stream.change("/stream?task_id=b"); stream.change("/stream?task_id=b")`)
	tab.wait(`got.includes("2")`)
	tab.want(`got.join()`, "1,2", "the events")
	for _, want := range []string{"task_id=a&heartbeat=event", "task_id=b&heartbeat=event&lastEventId=a-1"} {
		if got := <-queries; got != want {
			t.Errorf("got query %s, want %s", got, want)
		}
	}
}

// wantEvents checks that the log of a row lists exactly these events, each with an ID of its own.
func (tab *tab) wantEvents(t *testing.T, row string, want ...string) {
	t.Helper()
	var got []string
	items := "[...document.querySelectorAll(`" + row + " li`)]"
	if tab.get(items+`.map(li => li.textContent)`, &got); !slices.Equal(got, want) {
		t.Errorf("%s: got events %q, want %q", row, got, want)
	}
	tab.want(`new Set(`+items+`.map(li => li.dataset.eventId)).size`, len(want), "IDs of events")
}

// follow makes our page follow a task.
func (t *tab) follow(id string) {
	t.t.Helper()
	t.run(`const form = document.querySelector("#follow-form");
		form.elements.task_id.value = "` + id + `"; form.requestSubmit()`)
}

// pageClient returns the function openStream of the page, which README.md must have, too.
func pageClient(t *testing.T) string {
	t.Helper()
	_, client, _ := strings.Cut(edited(t, "index.html"), "\nfunction openStream(")
	client, _, ok := strings.Cut(client, "\n}\n")
	if client = "function openStream(" + client + "\n}\n"; !ok || !strings.Contains(edited(t, "README.md"), client) {
		t.Fatal("README.md does not have the openStream of index.html")
	}
	return client
}

// A connection may be lost without a word, and a proxy may answer in the gateway's place: a browser would wait for
// minutes in the first case, and give up for good in the second.
func TestBrowserSilence(t *testing.T) {
	t.Parallel()
	queries := make(chan url.Values, 100)
	answer := make(chan http.HandlerFunc, 100)
	server := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			queries <- r.URL.Query()
			select {
			case h := <-answer:
				h(w, r)
			default:
				http.NotFound(w, r)
			}
		}
	}))
	const (
		first = "event: connection_open\ndata: {}\nid: a-0\n\nevent: task_event\ndata: 1\nid: a-1\n\n"
		beat  = "event: heartbeat\ndata: 0.3\n\n"
		last  = "event: task_event\ndata: 2\nid: a-2\n\nevent: connection_close\ndata: {}\nid: close\n\n"
	)
	answer <- streamThat(first+beat, true) // and is silent from now on
	answer <- http.NotFound
	answer <- streamThat(beat, true)
	answer <- streamThat(beat+last, true)
	tab := startBrowser(t).open(server.URL + "/")
	tab.run(pageClient(t) + `window.got = []; window.lost = 0;
		openStream("/stream?id=7", { task_event: e => got.push(e.data), connection_close: () => got.push("end"), lost: () => lost++ })`)
	tab.wait(`got.join() == "1,2,end"`)
	for i, want := range []string{"", "a-1", "a-1", "a-1"} {
		q := <-queries
		if q.Get("id") != "7" || q.Get("heartbeat") != "event" || q.Get("lastEventId") != want || q.Has("lastEventId") != (want != "") {
			t.Errorf("request %d: got %v, want lastEventId %q", i, q, want)
		}
	}
	tab.want(`Math.min(lost, 3)`, 3, "losses that the page was told of, or more")
	tab.run(`dispatchEvent(new Event("beforeunload")); setTimeout(() => window.late = true, 3000)`)
	tab.wait(`window.late`)
	if n := len(queries); n > 0 {
		t.Errorf("the page made %d more requests after the end", n)
	}
}

// A gateway that is suspended keeps its connections open, so a browser sees no loss. The page does.
func TestBrowserSilentGateway(t *testing.T) {
	t.Parallel()
	site, tab := openSite(t, "HEARTBEAT_INTERVAL_SECONDS=0.5")
	site.post(t, "/api/tasks", oneExternal)
	tab.run(pageClient(t) + `window.ids = []; window.beats = 0; window.lost = 0;
		openStream("/api/sse/tasks?task_id=t", { heartbeat: () => beats++, lost: () => lost++,
			task_event: e => ids.push(e.lastEventId), connection_close: () => window.end = true })`)
	tab.wait(`ids.length == 1 && beats > 0`)
	site.gateway.signal(syscall.SIGSTOP)
	tab.wait(`lost > 0`)
	site.gateway.signal(syscall.SIGCONT)
	site.post(t, "/api/tasks/t/progress", `{"value":0.5}`)
	site.post(t, "/api/tasks/t/complete", `{"result":1}`)
	tab.wait(`window.end`)
	tab.want(`ids.join().replaceAll(ids[0].split("-")[0], "epoch")`, "epoch-1,epoch-2,epoch-3", "the IDs of the events")
}

// A page that uses a plain EventSource makes no more requests after the end.
func TestBrowserEnd(t *testing.T) {
	t.Parallel()
	site := startSite(t)
	site.post(t, "/api/tasks", oneExternal)
	browser := startBrowser(t)
	const follow = `window.source = new EventSource("/api/sse/tasks?task_id=t"); window.got = [];
		for (const name of ["connection_open", "task_event", "connection_close"])
			source.addEventListener(name, e => got.push(name + " " + e.lastEventId + " " + e.data))`
	first, second := browser.open(site.URL+"/healthz"), browser.open(site.URL+"/healthz")
	first.run(follow)
	first.wait(`got.length == 2`)
	second.run(follow)
	second.wait(`got.length == 2`)
	first.wait(`source.readyState == EventSource.CLOSED && got.at(-1) == 'connection_close close {"reason":"replaced"}'`)

	site.post(t, "/api/tasks/t/progress", `{"text":"half","value":0.5}`)
	site.post(t, "/api/tasks/t/complete", `{"result":1}`)
	second.wait(`source.readyState == EventSource.CLOSED && got.length == 5 &&
		got.at(-1) == 'connection_close close {"reason":"task_completed"}'`)
	first.want(`got.length`, 3, "events of the replaced tab, which should stay away")
}

// Another site that knows an ID can neither take over a stream nor consume its events, whatever it embeds. (Browsers
// mark such requests to loopback addresses and over HTTPS.)
func TestBrowserOtherSite(t *testing.T) {
	t.Parallel()
	site := startSite(t)
	site.post(t, "/api/tasks", oneExternal)
	const path = "/api/sse/tasks?task_id=t"
	other := serveTest(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	browser := startBrowser(t)
	victim := browser.open(site.URL + "/healthz")
	victim.run(`window.got = []; const source = new EventSource("` + path + `");
		for (const name of ["task_event", "connection_close"])
			source.addEventListener(name, e => got.push(name + " " + e.data))`)
	victim.wait(`got.length == 1`)
	// The same host, and another one, with another port.
	for _, address := range []string{other.URL, strings.Replace(other.URL, "127.0.0.1", "localhost", 1)} {
		attacker := browser.open(address + "/")
		attacker.run(`window.failed = 0; const url = "` + site.URL + path + `";
			const image = new Image(); image.onerror = () => failed++; image.src = url;
			fetch(url, { mode: "no-cors" }).then(answer => answer.text()).then(() => failed++, () => failed++);
			new EventSource(url).onerror = () => failed++`)
		attacker.wait(`failed == 3`)
	}
	site.post(t, "/api/tasks/t/progress", `{"value":0.5}`)
	victim.wait(`got.length > 1`)
	victim.want(`got.map(event => event.split(" ")[0]).join()`, "task_event,task_event", "what the victim has, whose stream goes on")
}

// A page can make its own name point at this machine. To its browser that is the same site, so the page could do
// anything to a backend in development, which asks for no token.
func TestBrowserRebinding(t *testing.T) {
	t.Parallel()
	backend := startBackend(t)
	address := strings.Replace(backend.URL, "127.0.0.1", "rebound.test", 1)
	tab := startBrowser(t).open(address + "/")
	tab.run(`fetch("/api/tasks", { method: "POST", headers: { "Content-Type": "application/json" }, body: '{"type":"demo"}' })
		.then(answer => window.post = answer.status);
		fetch("/api/tasks").then(answer => window.list = answer.status)`)
	tab.wait(`window.post && window.list`)
	tab.want(`post`, http.StatusForbidden, "the status of a POST by a page of another name")
	tab.want(`list`, http.StatusForbidden, "the status of the list")
	if list := mustAsk(t, "GET", backend.URL+"/api/tasks", ""); !strings.Contains(list, `"tasks":[]`) {
		t.Errorf("it started a task: %s", list)
	}
}

// A page of another origin survives a restart of the gateway behind nginx, and a limit of nginx.
func TestBrowserOtherOrigin(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()
	h := startHost(t, "CORS_ALLOW_ORIGIN=*", "RETRY_MILLISECONDS=100")
	nginx := h.front(t, "retry: 3000", "retry: 100", "limit_conn streams 1000", "limit_conn streams 1")
	path := startTask(t, h.backend.URL, "", oneExternal)
	page := serveTest(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	tab := startBrowser(t).open(page.URL + "/")
	tab.run(`window.lost = [0, 0]; window.got = [];
		window.sources = ["` + path + `", "/api/sse/utils/version?request_id=r"].map((path, i) => {
			const source = new EventSource("` + nginx.URL + `" + path);
			source.addEventListener("task_event", e => got.push(JSON.parse(e.data).event_type));
			source.onerror = () => lost[i]++;
			return source;
		})`)
	tab.wait(`got.length == 1 || lost[0] > 2`)
	tab.wait(`lost[0] > 2 || lost[1] > 2`) // one of them is beyond the limit
	h.gateway.kill(t)
	tab.run(`lost = [0, 0]`)
	tab.wait(`lost[0] > 1 && lost[1] > 1`)
	h.gateway.restart(t)
	tab.wait(`sources.some(source => source.readyState == EventSource.OPEN)`)
	tab.want(`sources.filter(source => source.readyState == EventSource.CLOSED).length`, 0, "EventSources of another origin that died")
}

// browserPatience is for what takes milliseconds unless the machine is busy with other tests.
const browserPatience = time.Minute

// A chromium is a headless Chromium. All tests that run at the same time share one, as it takes seconds of CPU to
// start.
type chromium struct {
	cmd     *exec.Cmd
	profile string // folder
	pipes   [2]*os.File

	mu      sync.Mutex // guards the rest
	next    int
	answers map[int]chan json.RawMessage
}

var sharedChromium struct {
	mu    sync.Mutex // guards the rest
	users int        // it runs while there are some
	*chromium
}

// A browser is what one test has of Chromium: a context of its own, as a private window is.
type browser struct {
	t testing.TB
	*chromium
	context string
}

func startBrowser(t testing.TB) *browser {
	t.Helper()
	if underRace {
		t.Skip("a browser takes too long beside the race detector; .ci/run has these tests without it")
	}
	needs(t, "chromium")
	shared := &sharedChromium
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.users == 0 {
		shared.chromium = startChromium(t)
	}
	shared.users++
	t.Cleanup(func() {
		shared.mu.Lock()
		defer shared.mu.Unlock()
		if shared.users--; shared.users == 0 {
			shared.chromium.kill()
		}
	})
	b := &browser{t: t, chromium: shared.chromium}
	var created struct{ BrowserContextID string }
	b.call("", "Target.createBrowserContext", nil, &created)
	b.context = created.BrowserContextID
	t.Cleanup(func() {
		b.call("", "Target.disposeBrowserContext", map[string]any{"browserContextId": b.context}, &struct{}{})
	})
	return b
}

func startChromium(t testing.TB) *chromium {
	t.Helper()
	fromTest, toBrowser, err1 := os.Pipe()
	fromBrowser, toTest, err2 := os.Pipe()
	profile, err3 := os.MkdirTemp("", "chromium")
	must(t, errors.Join(err1, err2, err3))
	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
		"--host-resolver-rules=MAP rebound.test 127.0.0.1", "--user-data-dir="+profile, "--remote-debugging-pipe")
	cmd.ExtraFiles = []*os.File{fromTest, toTest}         // descriptors 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its children write to the folder, too
	must(t, cmd.Start())
	fromTest.Close()
	toTest.Close()
	c := &chromium{cmd: cmd, profile: profile, pipes: [2]*os.File{toBrowser, fromBrowser}, answers: map[int]chan json.RawMessage{}}
	go c.read()
	return c
}

func (c *chromium) kill() {
	syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
	c.cmd.Wait()
	c.pipes[0].Close()
	c.pipes[1].Close()
	os.RemoveAll(c.profile)
}

// read hands out the answers, and ignores events.
func (c *chromium) read() {
	for r := bufio.NewReader(c.pipes[1]); ; {
		message, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID int `json:"id"`
		}
		json.Unmarshal(bytes.TrimRight(message, "\x00"), &m)
		c.mu.Lock()
		answer := c.answers[m.ID]
		delete(c.answers, m.ID)
		c.mu.Unlock()
		if answer != nil {
			answer <- bytes.TrimRight(message, "\x00")
		}
	}
}

// call calls a method of the protocol and decodes the answer's "result".
func (b *browser) call(session, method string, params map[string]any, result any) {
	b.t.Helper()
	answer := make(chan json.RawMessage, 1)
	b.mu.Lock()
	b.next++
	b.answers[b.next] = answer
	message := map[string]any{"id": b.next, "method": method, "params": params}
	if session != "" {
		message["sessionId"] = session
	}
	text, _ := json.Marshal(message)
	b.pipes[0].Write(append(text, 0))
	b.mu.Unlock()
	select {
	case text := <-answer:
		var m struct{ Result, Error json.RawMessage }
		if err := json.Unmarshal(text, &m); err != nil || m.Error != nil {
			b.t.Fatalf("%s: %s", method, text)
		}
		if err := json.Unmarshal(m.Result, result); err != nil {
			b.t.Fatalf("%s: %v in %s", method, err, text)
		}
	case <-time.After(browserPatience):
		b.t.Fatalf("%s: no answer", method)
	}
}

// A tab is a page of a browser.
type tab struct {
	*browser
	session string
}

func (b *browser) open(address string) *tab {
	b.t.Helper()
	var target struct{ TargetID string }
	b.call("", "Target.createTarget", map[string]any{"url": address, "browserContextId": b.context}, &target)
	var attached struct{ SessionID string }
	b.call("", "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	t := &tab{b, attached.SessionID}
	t.wait(fmt.Sprintf(`location.href == %q && document.readyState == "complete"`, address))
	return t
}

// get evaluates JavaScript in the page.
func (t *tab) get(expression string, value any) {
	t.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	t.call(t.session, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &answer)
	if answer.ExceptionDetails != nil {
		t.t.Fatalf("%s: %s", expression, answer.ExceptionDetails)
	}
	if err := json.Unmarshal(answer.Result.Value, value); err != nil {
		t.t.Fatalf("%s: %v", expression, err)
	}
}

func (t *tab) run(script string) {
	t.t.Helper()
	var done bool
	t.get("{"+script+"}; true", &done)
}

// want checks a number or a string.
func (t *tab) want(expression string, want any, what string) {
	t.t.Helper()
	var got any
	if t.get(expression, &got); fmt.Sprint(got) != fmt.Sprint(want) {
		t.t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// wait waits until a condition is truthy.
func (t *tab) wait(condition string) {
	t.t.Helper()
	eventually(t.t, browserPatience, condition, func() (ok bool) {
		t.get("!!("+condition+")", &ok)
		return ok
	})
}
