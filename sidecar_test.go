package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestStreamBeginning(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "RETRY_MILLISECONDS=1000",
		answering(200, `{"event":{"id":"e-0","name":"connection_open","data":"{}"}}`))
	c := g.get("/api/sse/tasks?task_id=1", "Accept: text/event-stream", "Accept-Encoding: gzip, br")
	resp := c.answer()
	if _, err := http.ParseTime(resp.Header.Get("Date")); err != nil {
		t.Errorf("Date: %v", err)
	}
	resp.Header.Del("Date")
	wantHeader := http.Header{
		"Content-Type":      {"text/event-stream"},
		"Cache-Control":     {"no-cache, no-transform"},
		"X-Accel-Buffering": {"no"},
	}
	if resp.Status != "200 OK" || !reflect.DeepEqual(resp.Header, wantHeader) || !resp.Close {
		t.Errorf("got %s, %v, to be closed: %v; want 200 OK, %v, true", resp.Status, resp.Header, resp.Close, wantHeader)
	}
	if got := c.line(); !regexp.MustCompile(`^retry: (1\d\d\d|2000)$`).MatchString(got) {
		t.Errorf("first line: got %q, want retry from 1000 to 2000", got)
	}
	if got, want := c.event(), "event: connection_open\ndata: {}\nid: e-0"; got != want {
		t.Errorf("got %q, want the event of the callback, %q", got, want)
	}
	g.wantLive(g.asked(c))
}

func TestCallbackBodies(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/api/sse/tasks?task_id=1", "User-Agent: test", "X-Twice: a", "x-tWICE: b,c", "Cookie: a=1", "Cookie: b=2; c=3",
		"LAST-EVENT-ID: e-7", "X-Empty:", `X-Odd: "<&>\`)
	c.Close()
	token := c.callback.Token
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(token) {
		t.Errorf("token: got %q, want a UUID of version 4", token)
	}
	request := `"request":{"url":"/api/sse/tasks?task_id=1","headers":{"host":"gateway.test","user-agent":"test",
		"x-twice":"a, b,c","cookie":"a=1; b=2; c=3","last-event-id":"e-7","x-empty":"","x-odd":"\"<&>\\"}}`
	for _, tt := range []struct{ got, want string }{
		{c.callback.body, `{"action":"connect","token":"` + token + `",` + request + `}`},
		{receive(t, g.disconnects).body, `{"action":"disconnect","reason":"client_closed","token":"` + token + `",` + request + `}`},
	} {
		if !reflect.DeepEqual(jsonValue(t, tt.got), jsonValue(t, tt.want)) {
			t.Errorf("got %s, want %s", tt.got, tt.want)
		}
	}
}

// The backend routes by the request target, so it must get the target exactly as the client sent it.
func TestTargetByteForByte(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	for _, target := range []string{
		"/", "/?", "//a/../b?x=%2F", "/./%2e%2E//", "/ä?ö=€", "/%C3%A4?%zz&;", "/a+b%20c?d+e%20f", "/?a=1&a=2#f", "/\"<>\\^`{|}",
		"http://elsewhere.test/a?b", "/metrics/", "//metrics", "/a/../metrics", "/internal/send/", "/internal//send", "/healthz/x",
		"/Readyz", "/%68ealthz", "/internal/%73end",
	} {
		if got := g.open(target).callback.Request.URL; got != target {
			t.Errorf("got %q, want %q", got, target)
		}
	}
}

// Callbacks may overtake each other, so each connect callback carries the number of its request. A disconnect has none.
func TestCallbacksCarryTheOrder(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	var run string
	for i := range 3 {
		c := g.open("/x")
		name, n, _ := strings.Cut(c.callback.header.Get("Sse-Gateway-Request"), "-")
		if run == "" {
			run = name
		}
		if want := strconv.Itoa(i + 1); run == "" || name != run || n != want {
			t.Errorf("request %s: got %s of %q, want it of %q", want, n, name, run)
		}
		c.Close()
		if got := receive(t, g.disconnects).header.Get("Sse-Gateway-Request"); got != "" {
			t.Errorf("disconnect callback: got %q, want none", got)
		}
	}
}

// The backend knows the token before the client has a stream, and may use it.
func TestBufferedEvents(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", holding("connect", gate, answering(201, `{"event":{"data":"first"}}`)))
	c, ended := g.asked(g.get("/x")), g.asked(g.get("/x"))
	token, endedToken := c.callback.Token, ended.callback.Token
	g.wantAnswers(sentBuffered, g.probe(token), g.send(token, "1"), g.send(token, "2"), g.send(endedToken, "last"), g.end(endedToken))
	g.wantSend(ended, "too late", sentGone)
	close(gate)
	c.begin()
	c.wantData("first", "1", "2")
	g.wantLive(c)
	ended.begin()
	ended.wantData("first", "last")
	ended.wantEnd()
}

// A send that arrives while the buffer is flushed must not overtake it. Many rounds make the race likely.
func TestBufferedEventsKeepOrder(t *testing.T) {
	t.Parallel()
	const events = 40
	padding := strings.Repeat("x", 2000) // makes the flush take its time
	var want []string
	for i := range events {
		want = append(want, strconv.Itoa(i)+padding)
	}
	gates := make(chan chan struct{}, 1)
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Action == "connect" {
			c.await(<-gates)
			io.WriteString(w, `{"event":{"data":"first"}}`)
		}
	})
	var sender sync.WaitGroup
	t.Cleanup(sender.Wait)
	for range 40 {
		gate := make(chan struct{})
		gates <- gate
		c := g.asked(g.get("/x"))
		sender.Go(func() {
			for i, data := range want {
				if i == events/4 {
					close(gate)
				}
				if got := g.send(c.callback.Token, data); got != sentBuffered && got != sentOK {
					t.Errorf("event %d: got %s", i, got)
				}
			}
		})
		c.begin()
		c.wantData("first")
		c.wantData(want...)
		sender.Wait()
		c.Close()
	}
}

func TestOddCallbackAnswers(t *testing.T) {
	t.Parallel()
	answers := []struct {
		body   string
		event  string // that the stream begins with
		ends   bool
		logged bool
	}{
		{body: ``}, {body: " \r\n"}, {body: `{}`}, {body: `{"event":{"data":"a"},"close":false}`, event: "data: a"},
		{body: `{"event":{"id":"1","name":"n","data":"a\nb","more":1},"more":[]}`, event: "event: n\ndata: a\ndata: b\nid: 1"},
		{body: `{"event":{"data":""}}`, event: "data: "},
		{body: `{"event":{"data":"a","retry":7}}`, event: "retry: 7\ndata: a"},
		{body: `{"heartbeat":"event"}`}, {body: `{"heartbeat":"comment"}`, logged: true}, {body: `{"heartbeat":null}`, logged: true},
		{body: `{"event":{"data":"a"},"heartbeat":1}`, event: "data: a", logged: true},
		{body: `{"event":{"data":"a","retry":0}}`, event: "data: a", logged: true},
		{body: `{"event":{"data":"a","retry":86400001}}`, event: "data: a", logged: true},
		{body: `{"close":true}`, ends: true},
		{body: `{"event":{"data":"a"},"close":true}`, event: "data: a", ends: true},

		{body: `OK`, logged: true}, {body: `null`, logged: true}, {body: `[]`, logged: true}, {body: `{"event":`, logged: true},
		{body: `{"event":{"data":"a"}}{}`, logged: true}, {body: "{\"event\":{\"data\":\"\xff\"}}", logged: true},
		{body: `{"event":null}`, logged: true}, {body: `{"event":"a"}`, logged: true}, {body: `{"event":{}}`, logged: true},
		{body: `{"event":{"data":1}}`, logged: true}, {body: `{"event":{"data":"a","id":null}}`, logged: true},
		{body: `{"event":{"data":"a","name":"b\nc"}}`, logged: true},
		{body: `{"Event":{"data":"a"},"CLOSE":true}`},
		{body: `{"close":true}}`, logged: true}, {body: `{"close":1}`, logged: true}, {body: `{"close":"true"}`, logged: true}, {body: `{"close":null}`, logged: true},
		{body: `{"event":1,"close":true}`, ends: true, logged: true},
		{body: `{"event":{"data":"a"},"close":1}`, event: "data: a", logged: true},
		{body: `{"event":{"data":"` + strings.Repeat("x", 1<<20) + `"}}`, logged: true},
	}
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		io.WriteString(w, answers[c.number()].body)
	})
	for i, tt := range answers {
		before := len(g.logged.String())
		c := g.open("/" + strconv.Itoa(i))
		if tt.event != "" {
			if got := c.event(); got != tt.event {
				t.Errorf("%.80s: got %q, want %q", tt.body, got, tt.event)
			}
		}
		if tt.ends {
			c.wantEnd()
		} else {
			g.wantLive(c)
		}
		if logged := strings.Contains(g.logged.String()[before:], "level=WARN"); logged != tt.logged {
			t.Errorf("%.80s: got a warning in the log: %v, want %v", tt.body, logged, tt.logged)
		}
	}
}

// Refusing

// transient are the statuses after which a browser must come back. Browsers give up for good on any status but 200.
var transient = []int{408, 425, 429, 500, 502, 503, 504, 599}

func TestRefusedByBackend(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "RETRY_MILLISECONDS=50", func(w http.ResponseWriter, c callbackCall) {
		w.Header().Set("Location", []string{"/elsewhere", "http://malformed:80a/"}[c.number()%2])
		answering(c.number(), `{"event":{"data":"not for the client"}}`)(w, c)
	})
	retries := map[int]bool{}
	for _, status := range append([]int{300, 301, 302, 303, 307, 308, 400, 401, 403, 404, 409, 410, 422, 451}, transient...) {
		target := "/" + strconv.Itoa(status)
		want := strconv.Itoa(status) + ` {"error":"connection rejected"}`
		g.get(target).wantReply(want)
		browser := g.get(target, "Accept: text/html, Text/Event-Stream;q=0.9")
		if !slices.Contains(transient, status) {
			browser.wantReply(want)
			continue
		}
		retry := browser.wantTransient("connection rejected")
		if retry < 50 || retry > 100 {
			t.Errorf("%d to a browser: got retry %d, want 50 to 100", status, retry)
		}
		retries[retry] = true
	}
	if len(retries) == 1 {
		t.Errorf("got retry %v for all browsers, want different times", retries)
	}
	g.waitMetric("gateway_streams", 0)
}

// An answer that breaks off or is not HTTP counts as no answer.
func TestBackendUnreachable(t *testing.T) {
	t.Parallel()
	nobody := newGatewayFixture(t, "CALLBACK_URL=http://127.0.0.1:1"+callbackTarget, nil)
	says := func(text string, ends bool) *gatewayFixture { // the backend, whatever it is asked
		return newGatewayFixture(t, "", func(w http.ResponseWriter, _ callbackCall) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			t.Cleanup(func() { conn.Close() })
			io.WriteString(conn, text)
			if ends {
				conn.Close()
			}
			panic(http.ErrAbortHandler)
		})
	}
	notHTTP, echoes := says("220 smtp.test\r\n", true), says("POST "+callbackTarget+" HTTP/1.1\r\n\r\n", true)
	upgrades := says("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", false)
	for _, g := range []*gatewayFixture{nobody, notHTTP, echoes, upgrades} {
		g.get("/x").wantReply(`503 {"error":"backend unreachable"}`)
		g.get("/x", "Accept: text/event-stream").wantTransient("backend unreachable")
		g.wantMetric(`gateway_callbacks_total{action="connect",status="error"}`, 2)
		if !strings.Contains(g.logged.String(), `msg="callback failed" action=connect err=`) {
			t.Error("the failure is not in the log")
		}
		g.waitMetric("gateway_streams", 0)
	}
}

// When a busy gateway gets to a request, the browser may have left and tried again. The gateway must not ask the
// backend about that request, which would look like a newer tab.
func TestClientHasLeft(t *testing.T) {
	t.Parallel()
	backend := newStubBackend(t, nil)
	p := startOwnGateway(t, "CALLBACK_URL="+backend.server.URL+callbackTarget)
	g := &gatewayFixture{stubBackend: backend, t: t, addr: strings.TrimPrefix(p.URL, "http://"), internal: p.URL, client: http.DefaultClient}
	p.signal(syscall.SIGSTOP)
	eventually(t, patience, "the gateway has stopped", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid()))
		return err == nil && strings.Contains(string(stat), ") T ")
	})
	for range 20 {
		g.get("/closed").Close()
		g.get("/reset").reset()
	}
	stays := g.get("/stays")
	p.signal(syscall.SIGCONT)
	stays.begin()
	g.waitMetric("gateway_streams", 1)
	for range len(backend.connects) {
		if c := <-backend.connects; c.Request.URL != "/stays" {
			t.Errorf("the backend was asked about %s", c.Request.URL)
		}
	}
}

// The time limit covers the whole answer. A backend that accepts and then stalls gets a disconnect callback.
func TestBackendTooSlow(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Action == "disconnect" {
			return
		}
		switch c.Request.URL {
		case "/stalls":
			io.WriteString(w, `{"event":`)
		case "/refuses":
			w.WriteHeader(http.StatusForbidden)
		default:
			<-c.givenUp
			panic(http.ErrAbortHandler)
		}
		http.NewResponseController(w).Flush()
		<-c.givenUp
	})
	began := time.Now()
	silent, stalls, browser := g.get("/silent"), g.get("/stalls"), g.get("/silent", "Accept: text/event-stream")
	refused := g.get("/refuses")
	for _, c := range []*streamClient{silent, stalls} {
		c.wantReply(`504 {"error":"backend too slow"}`)
	}
	browser.wantTransient("backend too slow")
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("the answers took %v, want 5 s", took)
	}
	refused.wantReply(`403 {"error":"connection rejected"}`)
	g.waitMetric(`gateway_callbacks_total{action="connect",status="timeout"}`, 3)
	g.waitMetric(`gateway_callbacks_total{action="connect",status="rejected"}`, 1)
	g.waitMetric("gateway_streams", 0)
}

// For localhost, which may be unknown in a container, both loopback addresses are tried.
func TestDialLocalhost(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := net.Listen(network, map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"}[network])
		if err != nil {
			t.Skipf("no loopback address: %v", err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		conn, err := dial(t.Context(), "tcp", "localhost:"+port)
		if err != nil {
			t.Errorf("only %s listens: %v", l.Addr(), err)
			continue
		}
		if got, want := conn.RemoteAddr().String(), l.Addr().String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		conn.Close()
	}
}

func TestNoCallbackURL(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "CALLBACK_URL=", nil)
	g.get("/x").wantReply(`503 {"error":"no callback URL configured"}`)
	g.get("/x", "Accept: text/event-stream").wantTransient("no callback URL configured")
	g.get("/readyz").wantReply(`503 {"configured":false,"status":"not_ready"}`)
}

func TestMaxConnections(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "MAX_CONNECTIONS=2 RETRY_MILLISECONDS=3000", nil)
	first, second := g.open("/1"), g.open("/2")
	refused := g.get("/3").answer()
	if got := refused.Header.Get("Retry-After"); refused.StatusCode != 503 || !regexp.MustCompile(`^[3-6]$`).MatchString(got) {
		t.Errorf("got %s with Retry-After %q, want 503 with 3 to 6", refused.Status, got)
	}
	g.get("/3", "Accept: text/event-stream").wantTransient("no capacity")
	first.Close()
	g.waitMetric("gateway_streams", 1)
	g.wantLive(second, g.open("/3")) // nobody was evicted
}

func TestRequestsThatOpenNoStream(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	for _, method := range []string{"HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get"} {
		resp := g.request(method, "/x", "Accept: text/event-stream").answer()
		if got := resp.Header.Get("Allow"); resp.StatusCode != 405 || got != "GET" {
			t.Errorf("%s: got %s with Allow %q, want 405 with GET", method, resp.Status, got)
		}
	}
	const noBody = `400 {"error":"a stream request has no body"}`
	for _, tt := range []struct {
		name, request string
		want          string // the beginning of status and body; net/http's own answers are not JSON
	}{
		{"body", "GET /x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", noBody},
		{"chunked body", "GET /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", noBody},
		{"malformed chunked body", "GET /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n", noBody},
		{"long path", "GET /" + strings.Repeat("x", 8<<10) + " HTTP/1.1\r\nHost: h\r\n\r\n", `414 {"error":"request target too long"}`},
		{"long query", "GET /?" + strings.Repeat("x", 8<<10) + " HTTP/1.1\r\nHost: h\r\n\r\n", `414 {"error":"request target too long"}`},
		{"not UTF-8", "GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n", `400 {"error":"request target is not UTF-8"}`},
		{"large header", "GET /x HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 32<<10) + "\r\n\r\n", "431 "},
		{"many headers", "GET /x HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: x\r\n", 8<<10) + "\r\n", "431 "},
		{"no host", "GET /x HTTP/1.1\r\n\r\n", "400 "},
		{"not HTTP", "hello\r\n\r\n", "400 "},
	} {
		c := g.dial(tt.request)
		status := c.answer().StatusCode
		body, _ := c.rest()
		if got := fmt.Sprint(status, " ", body); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	g.wantNotAsked()
	g.open("/" + strings.Repeat("x", 8<<10-1))
}

// More callbacks at once would exhaust the sockets of backend and gateway, so the rest must wait, not fail. The test is
// not parallel, because all clients must be there before the first callback times out.
func TestConnectCallbacksAreBounded(t *testing.T) {
	const clients, bound = 300, 256
	underWay := make(chan struct{}, bound)
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Action == "disconnect" {
			return
		}
		select {
		case underWay <- struct{}{}:
			c.await(gate)
			<-underWay
		default:
			t.Errorf("more than %d callbacks are under way", bound)
		}
	})
	var waiting []*streamClient
	for range clients {
		waiting = append(waiting, g.get("/x"))
	}
	g.waitMetric("gateway_streams", clients)
	eventually(t, patience, "all callbacks that may be under way", func() bool { return len(underWay) == bound })
	close(gate)
	for _, c := range waiting {
		c.begin()
	}
}

// Ending

func TestDisconnectReasons(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	for _, tt := range []struct {
		target string
		end    func(c *streamClient)
		reason string
	}{
		{"/client-closes", func(c *streamClient) { c.Close() }, "client_closed"},
		{"/client-resets", (*streamClient).reset, "client_closed"},
		{"/client-closes-its-half", func(c *streamClient) { c.CloseWrite() }, "client_closed"},
		{"/client-sends-a-byte", func(c *streamClient) { c.write("x") }, "client_closed"},
		{"/client-sends-a-request", func(c *streamClient) { c.write("GET / HTTP/1.1\r\nHost: h\r\n\r\n") }, "client_closed"},
		{"/backend-ends-it", func(c *streamClient) { g.end(c.callback.Token) }, "server_closed"},
	} {
		c := g.open(tt.target)
		tt.end(c)
		g.wantDisconnect(c, tt.reason)
		g.wantSend(c, "late", sentGone)
	}
	g.waitMetric("gateway_streams", 0)
}

// Bytes that follow the request cannot belong to the stream; they may be a request that a proxy pipelined.
func TestPipelinedBytesEndTheStream(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	for _, end := range []string{"\r\n", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"} {
		c := g.asked(g.dial("GET /1 HTTP/1.1\r\nHost: h\r\n" + end + "GET /2 HTTP/1.1\r\nHost: h\r\n\r\n"))
		g.wantDisconnect(c, "client_closed")
	}
	g.waitMetric("gateway_streams", 0)
	g.wantNotAsked()
}

// A client that leaves while its callback waits for a free slot does not count as a stream any longer.
func TestClientLeavesBeforeItsCallback(t *testing.T) {
	t.Parallel()
	gateway, g := serveStreams(t, gatewayConfig{Retry: time.Second})
	for range maxConnecting {
		gateway.connecting <- struct{}{} // no slot is free
	}
	count := func(n int64) {
		t.Helper()
		eventually(t, patience, fmt.Sprint(n, " streams"), func() bool { return gateway.count.Load() == n })
	}
	closes, resets := g.get("/x"), g.get("/x")
	count(2)
	closes.Close()
	resets.reset()
	count(0)
	if got := gateway.met.callbacks.with("connect", "timeout").Load(); got != 0 {
		t.Errorf("got %d callbacks that were given up, want none: the clients had left", got)
	}
	g.wantNotAsked()
}

// A backend in the same process is told what is posted to a separate one. It is not told of the request again at the
// end, so no stream keeps that.
func TestCallbacksWithinAProcess(t *testing.T) {
	t.Parallel()
	headers := []string{"Last-Event-ID: a-1", "Last-Event-ID: \xff", "User-Agent: test"}
	_, g := serveStreams(t, gatewayConfig{Retry: time.Second})
	want, err := parseCallback([]byte(g.open("/x?a=%20", headers...).callback.body))
	must(t, err)
	if want.url != "/x?a=%20" || want.lastEventID != "a-1, \uFFFD" {
		t.Errorf("posted: got %+v", want)
	}

	gateway, g := serveStreams(t, gatewayConfig{Retry: time.Second})
	calls, order := make(chan callback, 2), ""
	gateway.backend = func(c callback) (status int, answer []byte) {
		order += c.order
		calls <- c
		return http.StatusOK, []byte(`{"event":{"name":"first","data":"one"}}`)
	}
	c := g.get("/x?a=%20", headers...)
	got := receive(t, calls)
	want.token, want.order = got.token, got.order
	c.begin()
	if first := c.line(); got != want || first != "event: first" || len(gateway.lookup([]byte(got.token)).request) > 0 {
		t.Errorf("got %+v, want %+v; the stream begins with %q", got, want, first)
	}
	c.reset()
	if got := receive(t, calls); got != (callback{action: "disconnect", token: want.token}) || order != gateway.name+"-1" {
		t.Errorf("got %+v at the end, and the order %q", got, order)
	}
}

// The client may leave before or after the backend's answer: both orders must work.
func TestClientLeavesDuringCallback(t *testing.T) {
	t.Parallel()
	gates := make(chan chan struct{}, 1)
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Action == "connect" {
			c.await(<-gates)
		}
		w.WriteHeader(c.number())
	})
	leave := []func(*streamClient){func(c *streamClient) { c.Close() }, (*streamClient).reset}
	for i := range 120 {
		status := []int{200, 204, 410}[i%3]
		gate := make(chan struct{})
		gates <- gate
		c := g.asked(g.get(fmt.Sprint("/", status)))
		var answer sync.WaitGroup
		answer.Go(func() { close(gate) })
		leave[i%2](c)
		answer.Wait()
		if status == 410 {
			continue // and there must be no disconnect callback
		}
		if got := receive(t, g.disconnects); got.Token != c.callback.Token || got.Reason == "server_closed" {
			t.Errorf("got disconnect of %s with reason %q, want of %s", got.Token, got.Reason, c.callback.Token)
		}
		g.wantSend(c, "late", sentGone)
	}
	g.waitMetric("gateway_streams", 0)
}

// The backend may hold a lock of its own while it ends a stream, so the end must not wait for its callback. The test
// ends more streams than disconnect callbacks may be under way.
func TestEndDoesNotWaitForTheCallback(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", holding("disconnect", gate, answering(200, "")))
	for range 50 {
		c := g.open("/x")
		g.wantAnswers(sentOK, g.end(c.callback.Token))
		c.wantEnd()
	}
	g.waitMetric("gateway_streams", 0)
	close(gate)
}

// A backend that has just started knows no streams. A reset ends all that are open or being opened, but no later ones.
func TestReset(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", func(_ http.ResponseWriter, c callbackCall) {
		if c.Request.URL == "/held" {
			c.await(gate)
		}
	})
	open, held := g.open("/x"), g.asked(g.get("/held"))
	const json = "Content-Type: application/json"
	for _, tt := range []struct {
		want    string
		headers []string
	}{
		{`415 {"error":"content type must be application/json","code":"media_type"}`, []string{"Authorization: Bearer " + callbackSecret}},
		{`401 {"error":"missing or wrong secret","code":"unauthorized"}`, []string{json}},
		{`401 {"error":"missing or wrong secret","code":"unauthorized"}`, []string{json, "Authorization: Bearer guessed"}},
		{sentOK, []string{json, "Authorization: Bearer " + callbackSecret}},
	} {
		g.wantLive(open)
		g.request("POST", "/internal/reset", append(tt.headers, "Content-Length: 0")...).wantReply(tt.want)
	}
	open.wantEnd()
	g.wantDisconnect(open, "server_closed")
	close(gate)
	held.begin()
	held.wantEnd()
	g.wantLive(g.open("/later"))
}

func TestMaxStreamSeconds(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "MAX_STREAM_SECONDS=0.5", nil)
	began := time.Now()
	c := g.open("/x")
	c.wantEnd()
	if took := time.Since(began); took < 400*time.Millisecond {
		t.Errorf("the stream ended after %v, want 0.4 to 0.5 s", took)
	}
	g.wantDisconnect(c, "server_closed")
}

// Not parallel, because a shutdown has limited time for all of this.
func TestGatewayShutdown(t *testing.T) {
	connecting, disconnecting := make(chan struct{}), make(chan struct{})
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		switch {
		case c.Action == "disconnect":
			c.await(disconnecting)
		case c.Request.URL == "/late":
			c.await(connecting)
		}
	})
	var open []*streamClient
	for range 100 {
		open = append(open, g.open("/x"))
	}
	late := g.asked(g.get("/late")) // is being opened when the shutdown comes

	code := make(chan int, 1)
	go func() { code <- g.stop() }()
	ends := make(chan time.Time, len(open))
	for _, c := range open {
		go func() {
			c.wantEnd()
			ends <- time.Now()
		}()
	}
	first := <-ends
	for range len(open) - 2 {
		<-ends
	}
	if spread := (<-ends).Sub(first); spread < 50*time.Millisecond {
		t.Errorf("all browsers lost their streams within %v, want at least 50 ms", spread)
	}
	g.get("/readyz").wantReply(`503 {"configured":true,"status":"not_ready"}`)
	if resp := g.get("/x").answer(); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("a new stream: got %s, %v; want 503 with Retry-After", resp.Status, resp.Header)
	}
	g.get("/x", "Accept: text/event-stream").wantTransient("shutting down")
	close(connecting)
	late.begin()
	late.wantEnd()
	close(disconnecting)
	if got := receive(t, code); got != 0 {
		t.Errorf("got exit code %d, want 0", got)
	}
	for range len(open) + 1 {
		if got := receive(t, g.disconnects); got.Reason != "server_closed" {
			t.Errorf("got disconnect reason %q, want server_closed", got.Reason)
		}
	}
}

// A service manager kills the gateway after a while, so a backend that hangs must not delay its exit.
func TestGatewayShutdownIsBounded(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", holding("disconnect", nil, answering(200, "")))
	c := g.open("/x")
	began := time.Now()
	code := g.stop()
	if took := time.Since(began); took > 5*time.Second || code != 0 {
		t.Errorf("got exit code %d after %v, want 0 within 5 s", code, took)
	}
	c.wantEnd()
}

// If a connection ended without an answer, a proxy would send 502 and the browser would give up for good. The test is
// not parallel, because all clients must be there before the first callback times out.
func TestGatewayShutdownAnswersConnectingClients(t *testing.T) {
	g := newGatewayFixture(t, "", holding("connect", nil, answering(200, "")))
	var asked []*streamClient
	for range maxConnecting {
		asked = append(asked, g.get("/x"))
	}
	for range maxConnecting {
		receive(t, g.connects)
	}
	waits := g.get("/x", "Accept: text/event-stream") // for its turn to be asked
	g.waitMetric("gateway_streams", maxConnecting+1)
	if got := g.stop(); got != 0 {
		t.Errorf("got exit code %d, want 0", got)
	}
	for i, c := range asked {
		got, want := c.reply(), `503 {"error":"shutting down"}`
		slow := i < len(asked)-1 && got == `504 {"error":"backend too slow"}` // asked too long before the stop
		if got != want && !slow {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	waits.wantTransient("shutting down")
}

// Living

func TestHeartbeat(t *testing.T) {
	t.Parallel()
	const interval, beats = 100 * time.Millisecond, 5
	g := newGatewayFixture(t, "HEARTBEAT_INTERVAL_SECONDS=0.1", func(w http.ResponseWriter, c callbackCall) {
		if c.Request.URL == "/event" {
			io.WriteString(w, `{"heartbeat":"event"}`)
		}
	})
	began := time.Now()
	clients := map[*streamClient]string{}
	for _, version := range []string{"1.0", "1.1"} {
		clients[g.dial("GET /x HTTP/"+version+"\r\nHost: h\r\n\r\n")] = ":"
		clients[g.dial("GET /event HTTP/"+version+"\r\nHost: h\r\n\r\n")] = "event: heartbeat\ndata: 0.1\n"
	}
	for c := range clients {
		c.begin()
	}
	for range beats {
		for c, want := range clients {
			for want := range strings.SplitSeq(want, "\n") {
				if got := c.line(); got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			}
		}
	}
	if took := time.Since(began); took < interval*(beats-2) {
		t.Errorf("%d heartbeats came within %v, want one every %v", beats, took, interval)
	}
}

// A page of the allowed origin can also read refusals, to tell why it was refused.
func TestGatewayCORS(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ settings, origin, credentials string }{
		{"MAX_CONNECTIONS=1", "", ""},
		{"MAX_CONNECTIONS=1 CORS_ALLOW_ORIGIN=*", "*", ""},
		{"MAX_CONNECTIONS=1 CORS_ALLOW_ORIGIN=https://app.test", "https://app.test", "true"},
	} {
		g := newGatewayFixture(t, tt.settings, nil)
		for name, resp := range map[string]*http.Response{
			"stream":       g.get("/x", "Origin: https://app.test").answer(),
			"refusal":      g.get("/x", "Origin: https://app.test").answer(),
			"transient":    g.get("/x", "Origin: https://app.test", "Accept: text/event-stream").answer(),
			"wrong method": g.request("PUT", "/x", "Origin: https://app.test").answer(),
			"other origin": g.get("/x", "Origin: https://evil.test").answer(),
		} {
			origin, credentials := resp.Header.Get("Access-Control-Allow-Origin"), resp.Header.Get("Access-Control-Allow-Credentials")
			if origin != tt.origin || credentials != tt.credentials {
				t.Errorf("%s: %s: got origin %q, credentials %q; want %q, %q", tt.settings, name, origin, credentials, tt.origin, tt.credentials)
			}
		}
	}
}

func TestGatewayPaths(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	for _, tt := range []struct{ method, target, want string }{
		{"GET", "/healthz", `200 {"status":"ok"}`},
		{"GET", "/readyz", `200 {"configured":true,"status":"ready"}`},
		{"GET", "/readyz?x=1", `200 {"configured":true,"status":"ready"}`},
		{"POST", "/healthz", `405 {"error":"method not allowed","code":"method_not_allowed"}`},
		{"DELETE", "/readyz", `405 {"error":"method not allowed","code":"method_not_allowed"}`},
		{"POST", "/metrics", `405 {"error":"method not allowed","code":"method_not_allowed"}`},
		{"GET", "/internal/send", `405 {"error":"method not allowed","code":"method_not_allowed"}`},
	} {
		g.request(tt.method, tt.target, "Accept: text/event-stream").wantReply(tt.want)
	}
	g.wantNotAsked()
}

// Browsers reach the public port. With INTERNAL_ADDR, internal paths are not found there, and do not open streams.
func TestInternalAddr(t *testing.T) {
	t.Parallel()
	addr := "127.0.0.1:" + strconv.Itoa(freePort(t))
	g := newGatewayFixture(t, "INTERNAL_ADDR="+addr, nil)
	for _, request := range []string{"POST /internal/send", "GET /internal/send", "POST /internal/reset", "GET /metrics", "HEAD /metrics"} {
		method, target, _ := strings.Cut(request, " ")
		if got := g.request(method, target, "Accept: text/event-stream").answer().StatusCode; got != 404 {
			t.Errorf("public %s: got %d, want 404", request, got)
		}
	}
	resp, err := g.client.Get(g.internal + "/x")
	must(t, err)
	resp.Body.Close()
	if n := len(g.connects); resp.StatusCode != 404 || n != 0 {
		t.Errorf("internal GET /x: got %s, want 404; the backend was asked %d times, want never", resp.Status, n)
	}
	g.wantLive(g.open("/x"))
	g.waitMetric("gateway_streams", 1)
}

func TestGatewayMetrics(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", holding("connect", gate, func(w http.ResponseWriter, c callbackCall) {
		if c.Request.URL == "/no" {
			w.WriteHeader(403)
		}
	}))
	first, refused := g.asked(g.get("/yes")), g.asked(g.get("/no"))
	token := first.callback.Token
	g.send(token, "1")
	g.send(token, "2")
	close(gate)
	first.begin()
	refused.reply()
	g.send(token, "3")
	g.probe(token) // not an event
	g.probe("")
	g.post("text/plain", `{"token":"`+token+`"}`)
	second := g.open("/yes")
	g.end(second.callback.Token)
	g.wantDisconnect(second, "server_closed")
	g.send(second.callback.Token, "late")
	g.send("unknown", "4")
	third := g.open("/yes")
	third.Close()
	g.wantDisconnect(third, "client_closed")
	g.waitMetric(`gateway_callbacks_total{action="disconnect",status="accepted"}`, 2)
	wantSeries(t, scrapeURL(g.client, g.internal), map[string]float64{
		`gateway_streams`:                                              1,
		`gateway_streams_opened_total`:                                 3,
		`gateway_streams_closed_total{reason="client_closed"}`:         1,
		`gateway_streams_closed_total{reason="server_closed"}`:         1,
		`gateway_streams_closed_total{reason="error"}`:                 0,
		`gateway_events_total{status="written"}`:                       1,
		`gateway_events_total{status="buffered"}`:                      2,
		`gateway_events_total{status="unknown_token"}`:                 2,
		`gateway_events_total{status="invalid"}`:                       2,
		`gateway_callbacks_total{action="connect",status="accepted"}`:  3,
		`gateway_callbacks_total{action="connect",status="rejected"}`:  1,
		`gateway_callbacks_total{action="connect",status="timeout"}`:   0,
		`gateway_callback_duration_seconds_count{action="connect"}`:    4,
		`gateway_callback_duration_seconds_count{action="disconnect"}`: 2,
	})
}
