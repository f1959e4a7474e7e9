package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Both roles together, as browsers and API clients see them. The gateway is always a process of its own here.

// soon is how long to wait for what takes milliseconds on an idle machine.
const soon = 20 * time.Second

// A visitor uses the program from outside.
type visitor struct {
	t            testing.TB
	client       *http.Client
	api, streams string // base URLs: of the backend, and of whoever holds the streams
}

func newVisitor(t testing.TB, api, streams string) visitor {
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return visitor{t, &http.Client{Transport: transport}, api, streams}
}

// post returns the answer of the API as "status body". Any goroutine may call it.
func (v visitor) post(path, body string) (answer string) {
	v.t.Helper()
	resp, err := v.client.Post(v.api+path, "application/json", strings.NewReader(body))
	if err != nil {
		v.t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Error(err)
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, bytes.TrimSpace(text))
}

func (v visitor) wantPost(path, body, want string) {
	v.t.Helper()
	if got := v.post(path, body); got != want {
		v.t.Errorf("POST %s %s: got %s, want %s", path, body, got, want)
	}
}

// status returns the status of a GET.
func (v visitor) status(target string) int {
	v.t.Helper()
	resp, err := v.client.Get(target)
	must(v.t, err)
	resp.Body.Close()
	return resp.StatusCode
}

// getText returns the answer to a GET.
func (v visitor) getText(path string) string {
	v.t.Helper()
	resp, err := v.client.Get(v.api + path)
	must(v.t, err)
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

// field posts, and returns a string field of the answer, which must be there.
func (v visitor) field(path, body, name string) string {
	v.t.Helper()
	answer := v.post(path, body)
	fields := map[string]string{}
	if _, text, _ := strings.Cut(answer, " "); json.Unmarshal([]byte(text), &fields) != nil || fields[name] == "" {
		v.t.Errorf("POST %s %s: got %s, want a %s", path, body, answer, name)
	}
	return fields[name]
}

// start starts a task and returns its ID.
func (v visitor) start(kind, params string) (id string) {
	v.t.Helper()
	return v.field("/api/tasks", fmt.Sprintf(`{"type":%q,"params":%s}`, kind, params), "task_id")
}

// progress and complete report on an external task and return the ID of the event that the report became.
func (v visitor) progress(id, text string) (eventID string) {
	v.t.Helper()
	return v.field("/api/tasks/"+id+"/progress", fmt.Sprintf(`{"text":%q,"value":0.5}`, text), "event_id")
}

func (v visitor) complete(id string) (eventID string) {
	v.t.Helper()
	return v.field("/api/tasks/"+id+"/complete", `{"result":"good"}`, "event_id")
}

// wantAnnounced announces a version to one request_id.
func (v visitor) wantAnnounced(id, version string, delivered bool) {
	v.t.Helper()
	status := map[bool]string{true: "delivered", false: "queued"}[delivered]
	v.wantPost("/api/deployments/version", fmt.Sprintf(`{"request_id":%q,"version":%q}`, id, version),
		fmt.Sprintf(`202 {"delivered":%t,"requestId":%q,"status":%q}`, delivered, id, status))
}

// wantBroadcast announces a version to everybody.
func (v visitor) wantBroadcast(version string, delivered int) {
	v.t.Helper()
	v.wantPost("/api/deployments/version", fmt.Sprintf(`{"version":%q}`, version),
		fmt.Sprintf(`202 {"delivered":%d,"failed":0,"version":%q}`, delivered, version))
}

// follow opens the stream of a task, and subscribe the version stream of a request_id.
func (v visitor) follow(id string, opts ...func(*eventSource)) *eventSource {
	v.t.Helper()
	return openEventSource(v.t, v.streams+taskPath(id), opts...)
}

func (v visitor) subscribe(id string) *eventSource {
	v.t.Helper()
	return openEventSource(v.t, v.streams+versionPath(id))
}

func taskPath(id string) string    { return "/api/sse/tasks?task_id=" + url.QueryEscape(id) }
func versionPath(id string) string { return "/api/sse/utils/version?request_id=" + url.QueryEscape(id) }

func waitOpen(t testing.TB, sources ...*eventSource) {
	t.Helper()
	for _, es := range sources {
		eventually(t, soon, "event source open", func() bool { return es.state() == "open" })
	}
}

// story returns a few words about each event. It leaves out connection_open: a gateway need not pass on what the
// backend answers to its callback.
func story(events []message) (lines []string) {
	for _, m := range events {
		var data struct {
			EventType              string                       `json:"event_type"`
			Data                   struct{ Text, Error string } // of a task_event
			Error, Reason, Version string                       // of the others
		}
		json.Unmarshal([]byte(m.Data), &data) // fails for a result, which is no such Data
		detail := cmp.Or(data.Data.Text, data.Data.Error, data.Error, data.Reason, data.Version)
		if m.Name != "connection_open" {
			lines = append(lines, strings.TrimSpace(cmp.Or(data.EventType, m.Name)+" "+detail))
		}
	}
	return lines
}

// wantStory waits until es has as many events as want, and compares them. It ignores what follows.
func wantStory(t testing.TB, es *eventSource, want ...string) {
	t.Helper()
	var got []string
	es.waitFor(t, soon, func(events []message) bool { got = story(events); return len(got) >= len(want) })
	if got = got[:len(want)]; !slices.Equal(got, want) {
		t.Errorf("got the events %q, want %q", got, want)
	}
}

// wantEnd is wantStory for a stream that ends with connection_close. A browser comes back with the ID of that event, is
// told 410, and stays away. With a gateway that sends no IDs this does not work, and is not checked.
func wantEnd(t testing.TB, es *eventSource, want ...string) {
	t.Helper()
	wantStory(t, es, want...)
	if events := es.events(); events[len(events)-1].ID == "" {
		return
	}
	if got := es.waitClosed(t, soon); got != http.StatusGone {
		t.Errorf("the event source gave up at status %d, want 410", got)
	}
	if got := story(es.events()); len(got) != len(want) {
		t.Errorf("got %q after the end", got[len(want):])
	}
}

// A system is a backend in this process, where tests can look into it, a gateway process, and a visitor of both. When
// its test ends, the invariants of the ConnectionManager must hold.
type system struct {
	visitor
	*backend
	gateway *process
}

// newSystem starts both roles. start is startGateway or startOwnGateway; env is for both roles.
func newSystem(t testing.TB, start func(testing.TB, ...string) *process, env ...string) *system {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	env = append([]string{
		"ADDR=" + l.Addr().String(), "SSE_CALLBACK_SECRET=shared",
		"CALLBACK_URL=http://" + l.Addr().String() + "/api/sse/callback?secret=shared",
		"RETRY_MILLISECONDS=50", // tests need less patience than browsers
	}, env...)
	cfg, err := loadBackendConfig(func(key string) string { return envValue(env, key) })
	must(t, err)
	gateway, logged := start(t, env...), &testOutput{}
	s := &system{
		visitor: newVisitor(t, "http://"+cfg.Addr, gateway.URL),
		backend: newBackend(cfg, gateway.URL, newRegistry("test"), slog.New(slog.NewTextHandler(logged, nil))),
		gateway: gateway,
	}
	server := newServer(s.log, s.reg, s.routes(nil))
	go server.Serve(l)
	s.work(t.Context())
	t.Cleanup(func() {
		server.Close()
		if err := checkConsistency(s.conns); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log of the backend:\n%s", logged)
		}
	})
	return s
}

// wantConnections waits until the gauge of a service is n.
func (s *system) wantConnections(service string, n int) {
	s.t.Helper()
	eventually(s.t, soon, fmt.Sprintf("%d connections of service %s", n, service), func() bool {
		return scrapeValue(scrapeAll(s.reg), fmt.Sprintf("sse_gateway_active_connections{service=%q}", service)) == float64(n)
	})
}

// wantStreams waits until the gateway has n streams, by its own account.
func (s *system) wantStreams(n int) {
	s.t.Helper()
	eventually(s.t, soon, fmt.Sprintf("%d streams of the gateway", n), func() bool {
		return scrapeValue(scrapeURL(s.client, s.gateway.URL), "gateway_streams") == float64(n)
	})
}

func TestIntegrationTask(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	wantEnd(t, s.follow(s.start("demo", `{"steps":2}`)), "task_started", "progress_update step 1 of 2",
		"progress_update step 2 of 2", "task_completed", "connection_close task_completed")
	wantEnd(t, s.follow(s.start("failing", `{"error_message":"out of paper"}`)),
		"task_started", "task_failed out of paper", "connection_close task_failed")
	wantEnd(t, s.follow("nobody-knows"), "error Task not found", "connection_close task_not_found")
	s.wantConnections("task", 0)
}

func TestIntegrationExternalTask(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	id := s.start("external", `{"task_id":"nightly","title":"Report of the night"}`)
	es := s.follow(id)
	eventIDs := []string{s.progress(id, "half"), s.progress(id, "nearly"), s.complete(id)}
	s.wantPost("/api/tasks/nightly/progress", `{"text":"late","value":1}`, `409 {"error":"task is finished","code":"task_finished","status":"completed"}`)
	wantEnd(t, es, "task_started", "progress_update half", "progress_update nearly",
		"task_completed", "connection_close task_completed")
	var got []string
	for _, m := range es.events() {
		if m.ID != "" && m.Name == "task_event" {
			got = append(got, m.ID)
		}
	}
	if got != nil && !slices.Equal(got[1:], eventIDs) {
		t.Errorf("got event IDs %q after the first, want %q as in the answers to the reports", got[1:], eventIDs)
	}
}

func TestIntegrationReplacement(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	id := s.start("external", `{}`)
	first := s.follow(id)
	wantStory(t, first, "task_started")
	second := s.follow(id)
	wantStory(t, second, "task_started")
	wantEnd(t, first, "task_started", "connection_close replaced")
}

// If they came back, tabs would replace each other forever, each with a replay of the whole task.
func TestIntegrationReplacedTabStaysAway(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startOwnGateway)
	id := s.start("external", `{}`)
	var tabs []*eventSource
	for range 3 {
		tab := s.follow(id)
		wantStory(t, tab, "task_started")
		tabs = append(tabs, tab)
	}
	for _, tab := range tabs[:2] {
		wantEnd(t, tab, "task_started", "connection_close replaced")
	}
	s.wantConnections("task", 1)
	s.complete(id)
	wantEnd(t, tabs[2], "task_started", "task_completed", "connection_close task_completed")
	for i, tab := range tabs {
		if tab.attempts() != 2 || tab.opens() != 1 {
			t.Errorf("tab %d: got %d attempts and %d opens, want 2 and 1", i, tab.attempts(), tab.opens())
		}
	}
}

func TestIntegrationVersion(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	s.wantAnnounced("me", "1.0", false)
	s.wantAnnounced("me", "1.1", false)
	es := s.subscribe("me")
	wantStory(t, es, "version 1.0", "version 1.1")
	other := s.subscribe("other")
	waitOpen(t, other)
	s.wantAnnounced("me", "1.2", true)
	s.wantAnnounced("other", "2.0", true)
	wantStory(t, es, "version 1.0", "version 1.1", "version 1.2")
	wantStory(t, other, "version 2.0")
}

func TestIntegrationBroadcast(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	early := []*eventSource{s.subscribe("a"), s.subscribe("b"), s.subscribe("c")}
	waitOpen(t, early...)
	s.wantBroadcast("1.0", 3)
	late := s.subscribe("d")
	wantStory(t, late, "version 1.0")
	s.wantBroadcast("1.0", 0) // they all have it
	s.wantBroadcast("1.1", 4)
	for _, es := range append(early, late) {
		wantStory(t, es, "version 1.0", "version 1.1")
	}
}

func TestIntegrationRejectedConnect(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	wantGivenUp(t, openEventSource(t, s.streams+"/api/sse/elsewhere"), http.StatusBadRequest)
	s = newSystem(t, startGateway, "SSE_CALLBACK_SECRET=not what the gateway says")
	wantGivenUp(t, s.follow(s.start("external", `{}`)), http.StatusUnauthorized)
	s.wantConnections("task", 0)
}

// wantGivenUp checks that an event source gives up for good at its first answer, which has this status.
func wantGivenUp(t *testing.T, es *eventSource, status int) {
	t.Helper()
	if got := es.waitClosed(t, soon); got != status || es.attempts() != 1 {
		t.Errorf("gave up at status %d after %d attempts, want %d after 1", got, es.attempts(), status)
	}
}

func TestIntegrationPageReload(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway)
	id := s.start("external", `{}`)
	s.progress(id, "1")
	before := s.follow(id)
	wantStory(t, before, "task_started", "progress_update 1")
	s.wantConnections("task", 1)
	before.close()
	s.wantConnections("task", 0)
	wantSeries(t, scrapeAll(s.reg), map[string]float64{`sse_gateway_connections_total{service="task",action="disconnect"}`: 1})
	s.progress(id, "2")
	wantStory(t, s.follow(id), "task_started", "progress_update 1", "progress_update 2")
}

// A browser that comes back gets exactly the rest. It comes back twice because connection_open, the only event of the
// second connection, must not make it forget how far it was.
func TestIntegrationReconnect(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startOwnGateway)
	id := s.start("external", `{}`)
	es := s.follow(id)
	s.progress(id, "1")
	wantStory(t, es, "task_started", "progress_update 1")
	es.cut()
	es.waitFor(t, soon, func(events []message) bool { return events[len(events)-1].Name == "connection_open" })
	es.cut()
	s.progress(id, "2")
	s.complete(id)
	wantEnd(t, es, "task_started", "progress_update 1", "progress_update 2",
		"task_completed", "connection_close task_completed")
	if got := es.opens(); got != 3 {
		t.Errorf("got %d opens, want 3", got)
	}
}

// startSplit starts each role in a process of its own, the gateway with start.
func startSplit(t testing.TB, start func(testing.TB, ...string) *process, env ...string) (v visitor, backend *process) {
	t.Helper()
	h := startHostBehind(t, start, append(env, "RETRY_MILLISECONDS=50", "API_TOKEN=")...)
	return newVisitor(t, h.backend.URL, h.gateway.URL), h.backend
}

// A gateway that is out of file descriptors can accept no connections. It must not crash or spin, and must recover.
func TestIntegrationOutOfDescriptors(t *testing.T) {
	t.Parallel()
	backend := newStubBackend(t, nil)
	p := gatewayProcess(t, []string{"CALLBACK_URL=" + backend.server.URL + callbackTarget},
		"sh", "-c", "ulimit -n 40; exec "+os.Args[0]+" gateway").mustStart(t)
	began := time.Now()
	var conns []net.Conn
	for range 100 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
		must(t, err)
		defer conn.Close()
		fmt.Fprint(conn, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		conns = append(conns, conn)
	}
	eventually(t, soon, "accepting fails", func() bool { return strings.Contains(p.output(), "too many open files") })
	time.Sleep(2 * time.Second)
	for _, conn := range conns {
		conn.Close()
	}
	n := strings.Count(p.output(), "msg=\"http server\"")
	if took := time.Since(began); float64(n) > took.Seconds()+2 {
		t.Errorf("%d lines of log in %v, want one a second", n, took)
	}
	eventually(t, soon, "recovered", p.isUp)
}

// A browser opens connections ahead of requests, and an http.Server that shuts down waits for them for 5 s.
func TestIntegrationSilentConnection(t *testing.T) {
	t.Parallel()
	gateway := startOwnGateway(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(gateway.URL, "http://"))
	must(t, err)
	defer conn.Close()
	began := time.Now()
	if code := gateway.stop(t); code != 0 || time.Since(began) > 3*time.Second {
		t.Errorf("exit code %d after %v, want 0 at once", code, time.Since(began))
	}
}

// A stream cut off without its last chunk would be an error to every client but a browser, and a proxy may log it.
func TestIntegrationGatewayStops(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startOwnGateway)
	const streams = 20
	ended := make(chan error, streams)
	for i := range streams {
		resp, err := s.client.Get(s.streams + versionPath(fmt.Sprint(i)))
		must(t, err)
		go func() {
			defer resp.Body.Close()
			_, err := io.Copy(io.Discard, resp.Body)
			ended <- err
		}()
	}
	s.wantConnections("version", streams)
	s.gateway.wantStop(t)
	if got := len(s.conns.Active()); got != 0 {
		t.Errorf("%d services have connections after the gateway's exit, want 0: it tells the backend first", got)
	}
	for range streams {
		if err := <-ended; err != nil {
			t.Errorf("a stream ended with %v, want its last chunk", err)
		}
	}
}

func TestIntegrationBackendStops(t *testing.T) {
	t.Parallel()
	backend := startBackend(t)
	v := newVisitor(t, backend.URL, backend.URL)
	es := v.follow(v.start("demo", `{"delay":60}`))
	wantStory(t, es, "task_started")
	backend.wantStop(t)
	wantStory(t, es, "task_started", "task_failed server is shutting down", "connection_close task_failed")
}

// A load balancer must send no requests to a process that is stopping, however long that takes. Here it takes long
// because a peer does not answer.
func TestIntegrationReadinessAtStop(t *testing.T) {
	t.Parallel()
	held, release := context.WithCancel(t.Context())
	peer := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); !bytes.Contains(body, []byte(`"action":"connect"`)) {
			<-held.Done()
		}
	}))

	gateway := startOwnGateway(t, "CALLBACK_URL="+peer.URL)
	waitOpen(t, openEventSource(t, gateway.URL))

	backend := startBackend(t, "SSE_GATEWAY_URL="+peer.URL)
	v := newVisitor(t, backend.URL, peer.URL)
	id := v.start("external", `{}`)
	v.post("/api/sse/callback", fmt.Sprintf(`{"action":"connect","token":"t","request":{"url":%q}}`, taskPath(id)))

	for _, p := range []*process{gateway, backend} {
		p.signal(syscall.SIGTERM)
		eventually(t, soon, "readiness 503", func() bool {
			resp, err := v.client.Get(p.URL + "/readyz")
			if err != nil {
				t.Fatalf("%v is gone before its work is done: %v", p.command, err)
			}
			resp.Body.Close()
			return resp.StatusCode == http.StatusServiceUnavailable
		})
	}
	v.wantPost("/api/tasks", `{"type":"demo"}`, `503 {"error":"shutting down","code":"shutting_down"}`)
	for _, p := range []*process{gateway, backend} {
		p.signal(syscall.SIGINT) // a wrapper passes on what a terminal has sent to both
	}
	release()
	for _, p := range []*process{gateway, backend} {
		eventually(t, 5*time.Second, "exit", func() bool { return p.exited.Err() != nil })
		if code := p.exitCode(); code != 0 {
			t.Errorf("%v: exit code %d, want 0", p.command, code)
		}
	}
}

// Whoever reads the log may be gone before the process is, as with a pipe to another program.
func TestLogUnread(t *testing.T) {
	t.Parallel()
	needsOwnGateway(t)
	p := gatewayProcess(t, []string{"CALLBACK_URL=http://127.0.0.1:1"}, os.Args[0], "gateway")
	read, write, err := os.Pipe()
	must(t, err)
	p.out = write
	p.mustStart(t)
	read.Close()
	write.Close()
	for range 2 { // the first one is logged
		resp, err := http.Get(p.URL + "/x")
		must(t, err)
		resp.Body.Close()
	}
	p.wantStop(t)
}

// A gateway that crashes sends no disconnect callbacks. Clients that come back count once, and the others only until
// the next sweep.
func TestIntegrationSweep(t *testing.T) {
	t.Parallel()
	s := newSystem(t, startGateway, "CONNECTION_SWEEP_SECONDS=2")
	stays := s.subscribe("stays")
	var leaves []*eventSource
	for i := range 20 {
		leaves = append(leaves, s.subscribe(fmt.Sprint(i)))
	}
	s.wantConnections("version", 21)
	s.gateway.kill(t)
	for _, es := range leaves {
		es.close()
	}
	s.gateway.restart(t)
	began := time.Now()
	s.wantConnections("version", 1)
	if took := time.Since(began); took > 2*s.cfg.Sweep {
		t.Errorf("the gauge was wrong for %v, want one sweep of %v", took, s.cfg.Sweep)
	}
	s.wantAnnounced("stays", "1.0", true)
	wantStory(t, stays, "version 1.0")
}

// net/http prints an unsolicited answer, which may hold a secret, to the standard logger.
func TestIntegrationUnaskedAnswerIsNotPrinted(t *testing.T) {
	t.Parallel()
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	callbacks := make(chan struct{}, 2)
	peer := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		conn, _, _ := http.NewResponseController(w).Hijack()
		defer conn.Close()
		io.WriteString(conn, answer)
		time.Sleep(50 * time.Millisecond) // until it has been read, and the connection is idle
		io.WriteString(conn, answer+"leak")
		io.Copy(io.Discard, conn) // until the gateway closes it
		callbacks <- struct{}{}
	}))
	p := startOwnGateway(t, "CALLBACK_URL="+peer.URL)
	resp, err := http.Get(p.URL + "/x")
	must(t, err)
	receive(t, callbacks)
	resp.Body.Close()
	receive(t, callbacks) // the end of the stream
	if got := p.output(); strings.Contains(got, "leak") {
		t.Errorf("got output %q", got)
	}
}

// BenchmarkReplay gives a fresh page the 1,000 events of a finished task.
func BenchmarkReplay(b *testing.B) {
	const events = 1000
	s := newSystem(b, startGateway)
	id := s.start("external", `{}`)
	text, half := "a text of usual length", 0.5
	for range events - 2 {
		s.tasks.Progress(id, report{text: &text, value: &half})
	}
	s.complete(id)
	for b.Loop() {
		resp, err := s.client.Get(s.streams + taskPath(id))
		must(b, err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if got := bytes.Count(body, []byte("event: task_event\n")); got != events || err != nil {
			b.Fatalf("got %d events and error %v, want %d", got, err, events)
		}
	}
	b.ReportMetric(events*float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

// BenchmarkBroadcast announces a version to 5,000 streams with one POST, and waits until all of them have it.
func BenchmarkBroadcast(b *testing.B) {
	s := newSystem(b, startGateway)
	clients := make(quietClients, atMost(b, 5000))
	for i := range clients {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.streams, "http://"))
		must(b, err)
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: h\r\n\r\n", versionPath(fmt.Sprint(i)))
		clients[i] = quiet(b, conn.(*net.TCPConn))
	}
	s.wantConnections("version", len(clients))
	for n := 0; b.Loop(); n++ {
		s.post("/api/deployments/version", fmt.Sprintf(`{"version":"1.%d"}`, n))
		for arrived := 0; arrived < len(clients); time.Sleep(time.Millisecond) {
			clients.read(func(text []byte) { arrived += bytes.Count(text, []byte("event: version\n")) })
		}
	}
}
