package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestSendAnswers(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	post := func(contentType, body, want string) { // with $ for the token
		t.Helper()
		if got := g.post(contentType, strings.ReplaceAll(body, "$", c.callback.Token)); got != want {
			t.Errorf("%s: %.100s: got %s, want %s", contentType, body, got, want)
		}
	}
	for _, tt := range []struct{ body, wire string }{ // what the client reads
		{`{"token":"$","event":{"data":"a"}}`, "data: a"},
		{`{"token":"$","event":{"id":"k-1","name":"n","data":"a\nb\r\nc\rd"},"close":false}`,
			"event: n\ndata: a\ndata: b\ndata: c\ndata: d\nid: k-1"},
		{`{"token":"$","event":{"id":"","name":"","data":""}}`, "data: "},
		{` { "close" : false , "event" : { "data" : "\u00e9\u0000" } , "token" : "$" } `, "data: é\x00"},
		{`{"token":"$","event":{"data":"a","other":1},"more":{"token":1}}`, "data: a"},
		{`{"token":"$","event":{"data":"a","retry":1}}`, "retry: 1\ndata: a"},
		{`{"token":"$","event":{"retry":86400000,"id":"1","name":"n","data":"a"}}`, "retry: 86400000\nevent: n\ndata: a\nid: 1"},
		{`{"token":"$","event":{"data":"a","retry":1.5e3}}`, "retry: 1500\ndata: a"},
	} {
		post("application/json", tt.body, sentOK)
		if got := c.event(); got != tt.wire {
			t.Errorf("%.100s: the client got %q, want %q", tt.body, got, tt.wire)
		}
	}
	for want, bodies := range map[string][]string{
		// A probe writes nothing. Names are case-sensitive.
		sentOK: {`{"token":"$"}`, `{"token":"$","close":false}`, `{"token":"$","Event":{"data":"a"},"CLOSE":true}`},
		`400 {"error":"body must be one JSON object"}`: {``, `null`, `[]`, `"$"`, `{"token":"$"`,
			`{"token":"$"}{"token":"$"}`, `{"token":"$"} x`, "{\"token\":\"$\",\"x\":\"\xff\"}"},
		`400 {"error":"token is missing or empty"}`: {`{}`, `{"token":""}`, `{"Token":"$"}`, `{"event":{"data":"a"}}`},
		`400 {"error":"a field has the wrong type"}`: {`{"token":null}`, `{"token":1}`, `{"token":["$"]}`,
			`{"token":"$","event":null}`, `{"token":"$","event":"a"}`, `{"token":"$","event":[]}`, `{"token":"$","event":true}`,
			`{"token":"$","event":{"data":null}}`, `{"token":"$","event":{"data":{}}}`,
			`{"token":"$","event":{"data":"a","id":1}}`, `{"token":"$","event":{"data":"a","name":null}}`,
			`{"token":"$","event":{"data":"a","retry":null}}`, `{"token":"$","event":{"data":"a","retry":"1"}}`,
			`{"token":"$","close":null}`, `{"token":"$","close":0}`, `{"token":"$","close":"true"}`,
			`{"token":"$","event":{"data":"a"},"close":{}}`},
		`400 {"error":"event retry must be a whole number of milliseconds from 1 to 86400000"}`: {
			`{"token":"$","event":{"data":"a","retry":0}}`, `{"token":"$","event":{"data":"a","retry":1.5}}`,
			`{"token":"$","event":{"data":"a","retry":-1}}`, `{"token":"$","event":{"data":"a","retry":86400001}}`},
		`400 {"error":"event data is missing"}`: {`{"token":"$","event":{"retry":1}}`, `{"token":"$","event":{}}`,
			`{"token":"$","event":{"Data":"a"}}`, `{"token":"$","event":{"id":"1","name":"n"}}`},
		`400 {"error":"event name and id must not contain CR, LF or NUL"}`: {
			`{"token":"$","event":{"data":"a","id":"1\n"}}`, `{"token":"$","event":{"data":"a","name":"\r"}}`,
			`{"token":"$","event":{"data":"a","id":"\u0000"}}`, `{"token":"$","event":{"data":"a","name":"n\ndata: b"}}`},
		`400 {"error":"a field is given twice"}`: {`{"token":"$","token":"$"}`, `{"token":"$","event":{"data":"a","data":"b"}}`,
			`{"token":"$","event":{"data":"a","retry":1,"retry":1}}`},
		sentGone: {`{"token":"00000000-0000-4000-8000-000000000000"}`, `{"token":"?","event":{"data":"a"},"close":true}`, `{"token":"$ "}`},
		`413 {"error":"request body too large","code":"too_large"}`: {`{"token":"$","x":"` + strings.Repeat("x", 1<<20) + `"}`},
	} {
		for _, body := range bodies {
			post("application/json", body, want)
		}
	}
	for contentType, want := range map[string]string{
		"application/json;charset=UTF-8":    sentOK,
		"Application/JSON":                  sentOK,
		"":                                  `415 {"error":"content type must be application/json","code":"media_type"}`,
		"text/plain":                        `415 {"error":"content type must be application/json","code":"media_type"}`,
		"application/x-www-form-urlencoded": `415 {"error":"content type must be application/json","code":"media_type"}`,
	} {
		post(contentType, `{"token":"$"}`, want)
	}
	// The last event is written before the end. Then the stream is gone, even before the client has done anything.
	post("application/json", `{"close":true,"event":{"data":"last"},"token":"$"}`, sentOK)
	post("application/json", `{"token":"$"}`, sentGone)
	c.wantData("last")
	c.wantEnd()
}

// A malformed body is the sender's fault, and does not affect the stream that it names.
func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	valid := `{"token":"` + c.callback.Token + `","event":{"id":"1","name":"n","data":"\u00e9\n"},"close":true}`
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		body := apiMalformed(random, valid)
		if got := g.post("application/json", body); !strings.HasPrefix(got, `4`) {
			t.Errorf("%q: got %s, want a status 4xx", body, got)
		}
	}
	g.wantLive(c)
}

// A send that breaks off on its way is no verdict on its event, or the backend would skip that one. So it is answered
// with a status that says so, whoever reads the request.
func TestSendBrokenOff(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	for _, contentType := range []string{"application/json", "application/x-ndjson"} {
		text := sendText(contentType, []byte(`{"token":"`+c.callback.Token+`","event":{"data":"x"}}`+"\n"))
		chunked := strings.Replace(text, "\r\nContent-Length: ", "\r\nTransfer-Encoding: chunked\r\nX-Length: ", 1)
		head, body, _ := strings.Cut(chunked, "\r\n\r\n")
		chunked = fmt.Sprintf("%s\r\n\r\n%x\r\n%s", head, len(body), body)
		probe := sendText("application/json", []byte(`{"token":"`+c.callback.Token+`"}`))
		for _, first := range []string{"", probe} { // then the connection is no longer read by net/http
			for _, part := range []string{text[:len(text)-2], text[:len(text)-30], chunked} {
				conn := g.dial(first)
				if first != "" {
					conn.wantReply(sentOK)
				}
				conn.write(part)
				conn.CloseWrite()
				conn.wantReply(`408 {"error":"request body broke off","code":"broken_off"}`)
			}
		}
	}
	g.wantLive(c)
}

func TestBatch(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Request.URL == "/held" {
			c.await(gate)
		}
	})
	open, ended, held := g.open("/x"), g.open("/x"), g.asked(g.get("/held"))
	lines := []struct{ body, want string }{
		{`{"token":"$open","event":{"data":"1"}}`, `{"status":"ok"}`},
		{`{"token":"$held","event":{"data":"a"}}`, `{"status":"buffered"}`},
		{`{"token":"$open","event":{"data":"2"},`, `{"status":400,"error":"body must be one JSON object"}`},
		{`{"token":"$open","event":{"id":"3"}}`, `{"status":400,"error":"event data is missing"}`},
		{`{"token":"unknown","event":{"data":"4"}}`, `{"status":404}`},
		{`{"token":"$ended","event":{"data":"last"},"close":true}` + "\r", `{"status":"ok"}`},
		{`{"token":"$ended"}`, `{"status":404}`},
		{`{"token":"$open","event":{"data":"` + strings.Repeat("x", 1<<20) + `"}}`, `{"status":413}`},
		{"\t {\"token\":\"$open\",\"event\":{\"data\":\"5\"}} ", `{"status":"ok"}`},
		{"\u00a0{\"token\":\"$open\"}", `{"status":400,"error":"body must be one JSON object"}`},
		{`{"token":"$open"}`, `{"status":"ok"}`},
	}
	var bodies, want []string
	for _, line := range lines {
		bodies, want = append(bodies, line.body), append(want, line.want)
	}
	tokens := strings.NewReplacer("$open", open.callback.Token, "$ended", ended.callback.Token, "$held", held.callback.Token)
	batch := tokens.Replace(strings.Join(bodies, "\n"))
	if got, want := g.post("application/x-ndjson", batch), "200 "+strings.Join(want, "\n"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	close(gate)
	held.begin()
	held.wantData("a")
	open.wantData("1", "5")
	ended.wantData("last")
	ended.wantEnd()
	g.wantAnswers("200 ", g.post("application/x-ndjson", ""))
	g.wantAnswers(`413 {"error":"request body too large","code":"too_large"}`, g.post("application/x-ndjson", strings.Repeat("\n", 4<<20+1)))
}

// Consecutive events for one stream are one write, and so one chunk, unless they are large.
func TestBatchWritesARowAtOnce(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	a, b := g.open("/a"), g.open("/b")
	large := strings.Repeat("x", maxBurst/8)
	line := func(c *streamClient, data string) string {
		return string(appendSend(nil, c.callback.Token, &event{Data: data}, data == "end")) + "\n"
	}
	batch := line(a, "1") + line(a, "2") + line(b, "other") + line(a, "3") + "{}\n" + line(a, "4") + line(a, "5") +
		strings.Repeat(line(a, large), 5) + line(a, "end") + line(a, "late")
	ok, bad := `{"status":"ok"}`, `{"status":400,"error":"token is missing or empty"}`
	want := strings.Join([]string{"200 " + ok, ok, ok, ok, bad, ok, ok, ok, ok, ok, ok, ok, ok, `{"status":404}`}, "\n")
	if got := g.post("application/x-ndjson", batch); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	wire := ""
	for _, row := range [][]string{{"1", "2"}, {"3"}, {"4", "5", large, large, large, large}, {large}, {"end"}} {
		var chunk []byte
		for _, data := range row {
			chunk = appendEvent(chunk, sentEvent{data: []byte(data)})
		}
		wire += fmt.Sprintf("%x\r\n%s\r\n", len(chunk), chunk)
	}
	a.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(a.wire); string(got) != wire+lastChunk || err != nil {
		t.Errorf("got %.300q, %v, want %.300q", got, err, wire+lastChunk)
	}
	b.wantData("other")
	g.waitMetric(`gateway_events_total{status="written"}`, 12)
	g.waitMetric(`gateway_events_total{status="unknown_token"}`, 1)
}

// The events of a row are taken or refused together, so none of a refused row may reach the client.
func TestBatchRefusesWholeRows(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=4096", nil)
	c := g.open("/x")
	batch := strings.Repeat(string(appendSend(nil, c.callback.Token, &event{Data: strings.Repeat("x", 200)}, false))+"\n", 300)
	taken := 0
	for answer := ""; !strings.Contains(answer, "404"); taken += strings.Count(answer, `"ok"`) {
		answer = g.post("application/x-ndjson", batch)
	}
	text, _ := c.rest()
	if got := strings.Count(text, "x\n\n"); got != taken {
		t.Errorf("the client got %d whole events, but %d were taken", got, taken)
	}
}

// A body that is taken is read as encoding/json reads it, and so is the body that appendSend makes of it.
func FuzzSendBody(f *testing.F) {
	f.Add([]byte(`{"token":"a","event":{"id":"1","name":"n","data":"a\nb"},"close":true}`))
	f.Add([]byte(`{"token":"a"}`))
	f.Add([]byte(`{"token":null,"event":{"data":1,"data":2},"close":0}`))
	f.Add([]byte(` { "close" : false , "event" : { "data" : "\ud800" } , "token" : "\u0000" } `))
	g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newRegistry("test"))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", "/internal/send", bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		g.serveSend(w, r)
		m, err := parseSend(bytes.Clone(body))
		wantStatus := http.StatusNotFound
		if err != nil {
			wantStatus = http.StatusBadRequest
		}
		if w.Code != wantStatus {
			t.Errorf("%q: got status %d, want %d after %v", body, w.Code, wantStatus, err)
		}
		if err != nil {
			return
		}
		o, err := slowObject(body)
		e, eventErr := slowObject(o["event"])
		if err != nil || m.event.data != nil && eventErr != nil {
			t.Skip() // an unknown field is given twice
		}
		text := func(o object, name string) (s string) { json.Unmarshal(o[name], &s); return s }
		wantToken, wantEnd := text(o, "token"), string(o["close"]) == "true"
		var want *event
		if o["event"] != nil {
			want = &event{ID: text(e, "id"), Name: text(e, "name"), Data: text(e, "data")}
		}
		for _, body := range [][]byte{body, appendSend(nil, wantToken, want, wantEnd)} {
			m, err := parseSend(bytes.Clone(body))
			var got *event
			if m.event.data != nil {
				got = &event{ID: string(m.event.id), Name: string(m.event.name), Data: string(m.event.data)}
			}
			if m.event.oneLine && bytes.ContainsAny(m.event.data, "\r\n") {
				t.Errorf("%q: the data %q counts as one line", body, m.event.data)
			}
			if err != nil || string(m.token) != wantToken || m.end != wantEnd || !reflect.DeepEqual(got, want) {
				t.Errorf("%q: got %q, %+v, %v, %v; want %q, %+v, %v", body, m.token, got, m.end, err, wantToken, want, wantEnd)
			}
		}
	})
}
