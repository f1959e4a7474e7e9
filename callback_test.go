package main

import (
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// identifiers returns the identifiers that have a connection, sorted and joined by spaces.
func (api *apiFixture) identifiers() string {
	api.conns.mu.Lock()
	defer api.conns.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(api.conns.connections)), " ")
}

// wantConnected checks the identifiers that have a connection.
func (api *apiFixture) wantConnected(want string) {
	api.t.Helper()
	if got := api.identifiers(); got != want {
		api.t.Errorf("got %q connected, want %q", got, want)
	}
}

// callback posts a callback and returns the answer in one line.
func (api *apiFixture) callback(body string) string {
	return api.do("POST", "/api/sse/callback", body)
}

// wantConnect posts a connect callback and checks how the answer begins.
func (api *apiFixture) wantConnect(token, target, want string) {
	api.t.Helper()
	if got := api.callback(apiConnect(token, target)); !strings.HasPrefix(got, want) {
		api.t.Errorf("%.80s: got %.200s, want %s", target, got, want)
	}
}

// callbackAccepted is the answer to a connect callback.
const callbackAccepted = `200 {"event":{"id":"e-0","name":"connection_open","data":"{\"status\":\"connected\"}"}}`

// checkCallbackRoutes connects to each target and checks the identifier of the connection.
func checkCallbackRoutes(t *testing.T, api *apiFixture, routes map[string]string) {
	t.Helper()
	for target, want := range routes {
		stream := api.connect(target)
		if got := api.identifiers(); got != want {
			t.Errorf("%s: got %q connected, want %q", target, got, want)
		}
		stream.leave()
	}
}

func TestCallbackRoutesToTaskService(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.external("abc")
	checkCallbackRoutes(t, api, map[string]string{
		"/api/sse/tasks?task_id=abc":                           "task:abc",
		"/api/sse/tasks/?task_id=abc":                          "task:abc",
		"/api/sse/tasks/deep/er?x=1&task_id=abc&other=task_id": "task:abc",
	})
}

func TestCallbackRoutesToVersionService(t *testing.T) {
	t.Parallel()
	checkCallbackRoutes(t, newAPI(t, ""), map[string]string{
		"/api/sse/utils/version?request_id=abc":      "version:abc",
		"/api/sse/utils/version/?request_id=a%20b":   "version:a b",
		"/api/sse/utils/version/x?request_id=%C3%BC": "version:ü",
	})
}

func TestCallbackUnknownURLReturns400(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	for _, target := range []string{
		"/", "/?task_id=a", "*", "not a path",
		"/api/sse?task_id=a",
		"/api/sse/tasksfoo?task_id=a",             // not the end of a segment
		"/api/sse/utils/versions?request_id=a",    // the same
		"/api/sse/utils?request_id=a",             // too short
		"/API/sse/tasks?task_id=a",                // paths are case-sensitive
		"/v1/api/sse/tasks?task_id=a",             // not at the beginning
		"/other?then=/api/sse/tasks&task_id=a",    // not in the path
		"api/sse/tasks?task_id=a",                 // not a request target
		"/api/sse/%zztasks?task_id=a",             // not a URL
		"/api/sse/tasks\x7f?task_id=a",            // the same
		"/api/sse/utils/../tasksx?task_id=a",      // not cleaned
		"/elsewhere/../api/sse/tasks?task_id=a#x", // the same
	} {
		got := api.callback(apiConnect("t", target))
		if want := "400 " + string(marshal(badRequest("cannot_route", "Cannot route URL: "+target))); got != want {
			t.Errorf("%s: got %s, want %s", target, got, want)
		}
	}
	api.wantConnected("")
}

func TestCallbackSecret(t *testing.T) {
	t.Parallel()
	const secret = "s3cret&+%/ü"
	api := newAPI(t, "SSE_CALLBACK_SECRET="+secret)
	for query, want := range map[string]bool{
		"":                                   false,
		"?secret=":                           false,
		"?secret=wr0ng":                      false,
		"?secret=s3cret":                     false,
		"?secret=s3cret&+%/ü":                false, // unescaped, so another one
		"?Secret=" + url.QueryEscape(secret): false,
		"?secret=" + url.QueryEscape(secret): true,
	} {
		got := api.do("POST", "/api/sse/callback"+query, apiConnect("t", "/api/sse/utils/version?request_id=r"))
		refused := `401 {"error":"missing or wrong secret","code":"unauthorized"}`
		if wantAnswer := map[bool]string{true: callbackAccepted, false: refused}[want]; got != wantAnswer {
			t.Errorf("%q: got %s, want %s", query, got, wantAnswer)
		}
	}
	log := api.logged.String()
	if got := strings.Count(log, `level=WARN msg="callback with a missing or wrong secret"`); got == 0 || got == 6 {
		t.Errorf("got %d warnings for 6 callbacks, want at least one, but fewer than 6:\n%s", got, log)
	}
	if strings.Contains(log, "s3cret") || strings.Contains(log, "wr0ng") {
		t.Errorf("a secret is in the log:\n%s", log)
	}
}

func TestCallbackBody(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	const good = `{"action":"connect","token":"t","request":{"url":"/api/sse/utils/version?request_id=r","headers":{"user-agent":"x"}}}`
	bad := map[string]string{
		"no body":       ``,
		"not JSON":      `action=connect`,
		"not an object": `[` + good + `]`,
		"null":          `null`,
		"not UTF-8":     strings.Replace(good, `"x"`, "\"\xff\"", 1),
		"two values":    good + good,
		"a field twice": strings.Replace(good, `"token":"t"`, `"token":"t","token":"t"`, 1),
		"other case":    strings.Replace(good, `"token"`, `"Token"`, 1),
		"other action":  strings.Replace(good, `"connect"`, `"reconnect"`, 1),
	}
	for name, others := range map[string][]string{
		`"action":"connect"`: {`"x":1`, `"action":null`, `"action":1`, `"action":""`, `"action":["connect"]`},
		`"token":"t"`:        {`"x":1`, `"token":null`, `"token":1`, `"token":""`, `"token":{}`},
		good[strings.Index(good, `"request"`) : len(good)-1]: {`"x":1`, `"request":null`, `"request":"/"`, `"request":[]`, `"request":{}`},
		`"url":"/api/sse/utils/version?request_id=r"`:        {`"x":1`, `"url":null`, `"url":1`, `"url":""`, `"url":[]`},
		`"headers":{"user-agent":"x"}`:                       {`"headers":null`, `"headers":1`, `"headers":"x"`, `"headers":[]`},
		`"user-agent":"x"`:                                   {`"user-agent":null`, `"user-agent":1`, `"last-event-id":["close"]`},
	} {
		for _, other := range others {
			bad[other+" for "+name] = strings.Replace(good, name, other, 1)
		}
	}
	for name, body := range bad {
		if got := api.callback(body); !strings.HasPrefix(got, `400 {"error":`) {
			t.Errorf("%s: got %s, want 400", name, got)
		}
	}
	api.check("POST", "/api/sse/callback", `{"x":"`+strings.Repeat("x", maxCallback)+`"}`, `413 {"error":"request body too large","code":"too_large"}`)
	api.wantConnected("")
	for name, body := range map[string]string{
		"as it is":         good,
		"no headers":       strings.Replace(good, `,"headers":{"user-agent":"x"}`, ``, 1),
		"more fields":      strings.Replace(good, `{`, `{"x":null,`, 1),
		"escapes":          strings.Replace(good, `"token"`, `"\u0074oken"`, 1),
		"space all around": " \n" + strings.ReplaceAll(good, `,"`, " ,\t\"") + "\r\n",
	} {
		if got := api.callback(body); got != callbackAccepted {
			t.Errorf("%s: got %s, want %s", name, got, callbackAccepted)
		}
	}
}

// The browser of a finished stream comes back by itself. Only a status such as 410 stops it for good.
func TestCallbackFinishedStreamIsGone(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	for _, target := range []string{"/api/sse/tasks?task_id=a", "/api/sse/utils/version?request_id=r"} {
		api.check("POST", "/api/sse/callback", apiConnect("t", target, "close"), `410 {"error":"this stream is finished","code":"stream_finished"}`)
		api.wantConnected("")
	}
}

func TestCallbackDisconnect(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		connect := func(token string) { api.callback(apiConnect(token, "/api/sse/utils/version?request_id=r")) }
		connect("t1")
		connect("t2")
		for _, tt := range []struct{ name, body, connected string }{
			{"unknown token", apiDisconnect("t0"), "version:r"},
			{"replaced token", apiDisconnect("t1"), "version:r"},
			{"token alone", `{"action":"disconnect","token":"t0"}`, "version:r"},
			{"no URL", `{"action":"disconnect","token":"t0","request":{}}`, "version:r"},
			{"empty URL", `{"action":"disconnect","token":"t0","request":{"url":""}}`, "version:r"},
			{"path that has no route", apiDisconnect("t2"), ""},
			{"once more", apiDisconnect("t2"), ""},
		} {
			answer := api.callback(tt.body)
			if got := api.identifiers(); got != tt.connected || answer != "200 {}" {
				t.Errorf("%s: got %s and %q connected, want 200 {} and %q", tt.name, answer, got, tt.connected)
			}
		}
	})
}

func TestCallbackStop(t *testing.T) {
	// While the process stops, connects are refused, but disconnects are still handled.
	apiStory(t, "before", "", func(t *testing.T, api *apiFixture) {
		stream := api.subscribe("r")
		api.stop(t.Context())
		api.wantConnect("t", "/api/sse/utils/version?request_id=s", `503 {"error":"shutting down","code":"shutting_down"}`)
		stream.leave()
		api.wantConnected("")
	})

	// A stream accepted just after all streams were ended would stay open without a backend.
	apiStory(t, "during", "SSE_GATEWAY_URL=http://gateway.invalid", func(t *testing.T, api *apiFixture) {
		api.backend.callback.services[serviceVersion] = stoppingService{api.version, func() { api.stop(t.Context()) }}
		got := api.callback(apiConnect("t", "/api/sse/utils/version?request_id=r"))
		if want := strings.TrimSuffix(callbackAccepted, "}") + `,"close":true}`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// stoppingService is a service that stops the process during a connect callback.
type stoppingService struct {
	streamService
	stop func()
}

func (s stoppingService) OnConnect(id string, c connectRequest) (event, bool, error) {
	s.stop()
	return s.streamService.OnConnect(id, c)
}

func TestOnConnectValidUUID(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		id := newToken()
		api.connect("/api/sse/tasks?task_id=" + id)
		api.connect("/api/sse/utils/version?request_id=" + id)
		api.wantConnected("task:" + id + " version:" + id)
	})
}

// A warning has the bad ID quoted, so that a line break in it does not start another line of the log.
func TestCallbackRefusesBadIDs(t *testing.T) {
	t.Parallel()
	longest := strings.Repeat("ü", maxID/2)
	control := func(r rune) bool { return r < ' ' || r == utf8.RuneError }
	for _, target := range []string{"/api/sse/tasks?task_id=", "/api/sse/utils/version?request_id=", "/api/sse/stream?request_id=r&task_id="} {
		for id, logged := range map[string]string{
			"":                             "",
			"&other=a":                     "",
			"a:b":                          "a:b", // two services could share an identifier
			"%3A":                          ":",
			"%zz":                          "",
			"a%0Alevel=INFO":               "nlevel=INFO",
			"%00":                          "x00",
			"%7F":                          "",
			"%C2%85":                       "u0085",
			"%FF":                          "xff",
			url.QueryEscape(longest) + "x": "üü",
		} {
			api := newAPI(t, "")
			api.check("POST", "/api/sse/callback", apiConnect("t", target+id), `400 {"error":"`+errBadID.Error()+`","code":"bad_id"}`)
			api.wantConnected("")
			line, ok := strings.CutSuffix(api.logged.String(), "\n")
			if !ok || !strings.Contains(line, "level=WARN") || !strings.Contains(line, logged) || strings.ContainsFunc(line, control) {
				t.Errorf("%s%s: got log %q, want one line, a warning with %s", target, id, line, logged)
			}
		}
		newAPI(t, "").wantConnect("t", target+url.QueryEscape(longest), "200 ")
	}
}

// Every body gets an answer in JSON, with 200 or a 4xx, and only a body with the right fields is accepted.
func FuzzCallbackBody(f *testing.F) {
	f.Add(apiConnect("t", "/api/sse/tasks?task_id=a"))
	f.Add(apiConnect("t", "/api/sse/utils/version?request_id=r", "e-1"))
	f.Add(apiConnect("t", "/api/sse/utils/version?request_id=r", "close"))
	f.Add(apiConnect("t", "/elsewhere"))
	f.Add(apiConnect("t", "/api/sse/tasks?task_id=a%3Ab"))
	f.Add(apiDisconnect("t"))
	f.Add(`{"action":"connect","token":null,"request":[]}`)
	f.Add(`{"action":"disconnect","token":"\ud800","request":{"url":"\\"}}`)
	f.Fuzz(func(t *testing.T, body string) {
		got := newAPI(t, "").callback(body)
		status, answer, _ := strings.Cut(got, " ")
		if !slices.Contains([]string{"200", "400", "410", "413"}, status) || !json.Valid([]byte(answer)) {
			t.Errorf("%q: got %s, want 200 or 4xx and JSON", body, got)
		}
		// Maps, because encoding/json matches the names of struct fields in any case.
		var c, request map[string]json.RawMessage
		json.Unmarshal([]byte(body), &c)
		json.Unmarshal(c["request"], &request)
		text := func(raw json.RawMessage) bool { return len(raw) > len(`""`) && raw[0] == '"' }
		good := text(c["action"]) && text(c["token"]) && (text(request["url"]) || answer == "{}")
		if status == "200" && !good {
			t.Errorf("%q: got %s, want 400", body, got)
		}
	})
}

// A proxy in front may decide by the normalized path, or by the first of several keys in any case.
func TestCallbackTakesOnlyPlainTargets(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.external("a")
	for _, target := range []string{
		"/api/sse/x/../tasks?task_id=a", "/api/sse/./tasks?task_id=a", "/api/sse//tasks?task_id=a", "//api/sse/tasks?task_id=a",
		"/api/sse/tasks/..?task_id=a", "/api/sse/tasks/%2e%2e/x?task_id=a", "/api/sse/task%73?task_id=a", `/api/sse/tasks\x?task_id=a`,
		"/api/sse/tasks?Task_ID=a", "/api/sse/tasks?task%5Fid=a", "/api/sse/tasks?task_id=a&TASK_ID=b", "/api/sse/tasks?%74ask_id=b&task_id=a",
		"/api/sse/tasks?task_id=a&LastEventID=e-1", "/api/sse/tasks?task_id=a&Heartbeat=event",
		"/api/sse/tasks?x=#&task_id=a", "/api/sse/tasks?task_id=a#", "http://gateway/api/sse/tasks?task_id=a",
		"/api/sse/utils/version?Request_Id=a",
	} {
		api.wantConnect("t", target, `400 {"error":"Cannot route URL: `)
	}
	for _, target := range []string{
		"/api/sse/tasks?task_id=a&task_id=a", "/api/sse/tasks?task_id=a&task_id=", "/api/sse/utils/version?request_id=a&request_id=b",
		"/api/sse/tasks?task_id=a&request_id=x&request_id=y", "/api/sse/utils/version?request_id=a&task_id=x&task_id=y", // unread fields, too
	} {
		if got := api.callback(apiConnect("t", target)); !strings.HasSuffix(got, `"code":"duplicate_field"}`) {
			t.Errorf("%s: got %s, want 400", target, got)
		}
	}
	api.wantConnected("")
	if log := api.logged.String(); !strings.Contains(log, "level=DEBUG") || strings.Contains(log, "level=WARN") {
		t.Errorf("got log %s\nwant lines for debugging", log)
	}
}

// Some clients send no header, and name the last event in the query.
func TestCallbackLastEventIDInTheQuery(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.external("a")
		api.post("a/progress", `{"text":"","value":0.5}`)
		const target = "/api/sse/tasks?task_id=a"
		api.connect(target + "&lastEventId=e-1").checkStory("connection_open progress_update")
		api.connect(target + "&lastEventId=e-1&lastEventId=e-2").checkStory("connection_open")      // the last counts
		api.connect(target+"&lastEventId=e-2", "e-1").checkStory("connection_open progress_update") // header first
		api.connect(target+"&lastEventId=e-2", "").checkStory("connection_open")
		for _, query := range []string{"&lastEventId=close", "&lastEventId=e-1&lastEventId=close"} {
			api.wantConnect("t", target+query, "410 ")
		}
	})
}

func TestCallbackHeartbeatEvents(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.external("a")
	for target, want := range map[string]bool{
		"/api/sse/tasks?task_id=a&heartbeat=event":            true,
		"/api/sse/utils/version?heartbeat=event&request_id=r": true,
		"/api/sse/tasks?task_id=a&heartbeat=comment":          false,
		"/api/sse/tasks?task_id=a":                            false,
	} {
		got := api.callback(apiConnect("t", target))
		if !strings.HasPrefix(got, "200 ") || strings.HasSuffix(got, `,"heartbeat":"event"}`) != want {
			t.Errorf("%s: got %s, want heartbeat events: %t", target, got, want)
		}
	}
}

func TestCallbackReplaces(t *testing.T) {
	// A callback may come from a gateway that has died or given it up. It must not replace the page's live stream.
	apiStory(t, "asks first", "", func(t *testing.T, api *apiFixture) {
		const target, features = "/api/sse/utils/version?request_id=r", "Sse-Gateway-Features: batch, id, retry"
		living := api.connect(target)
		const gone = `503 {"error":"the gateway does not know this stream","code":"gateway_gone"}`
		api.check("POST", "/api/sse/callback", apiConnect("ghost", target), gone, features) // unknown token
		api.gateway.fail(errNoAnswer)
		api.check("POST", "/api/sse/callback", apiConnect("ghost", target), gone, features) // no answer
		api.gateway.fail(nil)
		living.checkStory("connection_open")
		if c := api.conns.connections["version:r"]; c == nil || c.token != living.token {
			t.Error("the living stream is not the connection any more")
		}
		api.connect(target, features).checkStory("connection_open") // it knows this one
		living.checkStory("connection_open connection_close:replaced")
	})

	// A gateway of another make would write an empty event if it were asked during its callback.
	apiStory(t, "does not ask a foreign gateway", "", func(t *testing.T, api *apiFixture) {
		const target = "/api/sse/utils/version?request_id=r"
		api.connect(target)
		api.wantConnect("unknown", target, "200 ")
	})

	// The order of requests outlives the task. Otherwise the older request of a browser would replace its newer one.
	apiStory(t, "the order outlives the task", "", func(t *testing.T, api *apiFixture) {
		connect := func(token, order string) string {
			return api.do("POST", "/api/sse/callback", apiConnect(token, "/api/sse/tasks?task_id=a"), "Sse-Gateway-Request: "+order)
		}
		api.external("a")
		connect("six", "g-6")
		api.gateway.fail(errNoAnswer) // so that its stream stays
		api.post("a/complete", `{}`)
		api.settle()
		api.do("DELETE", "/api/tasks/a", "")
		for again := range 2 {
			if got := connect("five", "g-5"); !strings.Contains(got, `\"replaced\"`) || !strings.HasSuffix(got, `"close":true}`) {
				t.Errorf("got %s, want the end: replaced", got)
			}
			if again == 0 {
				api.external("a")
			}
		}
		if api.conns.tokens["six"] == nil {
			t.Error("the older request replaced the newer one")
		}
	})
}
