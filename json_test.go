package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"
)

func TestParseObject(t *testing.T) {
	for _, tt := range []struct {
		text    string
		want    object
		wantErr error
	}{
		// Members keep their text, whatever it is and whatever is around it.
		{`{}`, object{}, nil},
		{" \t\r\n{ \t\r\n} \t\r\n", object{}, nil},
		{`{"a":1}`, object{"a": []byte(`1`)}, nil},
		{"{ \"a\"\t:\r\n-1.5e+3 , \"b\" : true }", object{"a": []byte(`-1.5e+3`), "b": []byte(`true`)}, nil},
		{"{\"a\":null\r,\"b\":false\t}", object{"a": []byte(`null`), "b": []byte(`false`)}, nil},
		{`{"a":"","b":"x"}`, object{"a": []byte(`""`), "b": []byte(`"x"`)}, nil},
		{`{"a":{"b":[{"c":"}]"}]},"d":[]}`, object{"a": []byte(`{"b":[{"c":"}]"}]}`), "d": []byte(`[]`)}, nil},
		{`{"a":[ 1 , [ ] , { } ] }`, object{"a": []byte(`[ 1 , [ ] , { } ]`)}, nil},
		{`{"a":"\"}\\","b":"{[,: ]}"}`, object{"a": []byte(`"\"}\\"`), "b": []byte(`"{[,: ]}"`)}, nil},

		// Names are case-sensitive, and may have escapes.
		{`{"a":1,"A":2," a":3,"":4}`, object{"a": []byte(`1`), "A": []byte(`2`), " a": []byte(`3`), "": []byte(`4`)}, nil},
		{`{"\u0061\"}":1}`, object{`a"}`: []byte(`1`)}, nil},
		{`{"é":"\ud83d\ude00"}`, object{"é": []byte(`"\ud83d\ude00"`)}, nil},
		{`{"a":1,"a":1}`, nil, errDuplicate},
		{`{"a":1,"\u0061":2}`, nil, errDuplicate},
		{`{"a":{"b":1,"b":2}}`, object{"a": []byte(`{"b":1,"b":2}`)}, nil}, // whoever reads a checks this

		// One object, and nothing else.
		{``, nil, errNotJSON}, {` `, nil, errNotJSON}, {`null`, nil, errNotJSON}, {`[]`, nil, errNotJSON},
		{`"{}"`, nil, errNotJSON}, {`1`, nil, errNotJSON}, {`{}{}`, nil, errNotJSON}, {`{},`, nil, errNotJSON},
		{`{} x`, nil, errNotJSON}, {"{}\x00", nil, errNotJSON}, {"\ufeff{}", nil, errNotJSON}, {"\v{}", nil, errNotJSON},
		{`{`, nil, errNotJSON}, {`{"a"`, nil, errNotJSON}, {`{"a":`, nil, errNotJSON}, {`{"a":1`, nil, errNotJSON},
		{`{"a":1,}`, nil, errNotJSON}, {`{a:1}`, nil, errNotJSON}, {`{'a':1}`, nil, errNotJSON}, {`{"a":01}`, nil, errNotJSON},
		{`{"a":"`, nil, errNotJSON}, {`{"a":"\x"}`, nil, errNotJSON}, {"{\"a\":\"\n\"}", nil, errNotJSON},
		{`{"a":NaN}`, nil, errNotJSON}, {`{"a":1}//`, nil, errNotJSON}, {`{"a" 1}`, nil, errNotJSON},
		{"{\"a\":\"\xff\"}", nil, errNotJSON}, {"{\"\xc3\":1}", nil, errNotJSON},
	} {
		got, err := parseObject([]byte(tt.text))
		if err != tt.wantErr || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%q: got %q, %v; want %q, %v", tt.text, got, err, tt.want, tt.wantErr)
		}
	}
}

// A megabyte of brackets must not take more stack than intended.
func TestParseObjectDepth(t *testing.T) {
	for depth, want := range map[int]error{maxDepth: nil, maxDepth + 1: errNotJSON, 1 << 20: errNotJSON} {
		text := `{"a":` + strings.Repeat("[", depth) + strings.Repeat("]", depth) + `}`
		if _, got := parseObject([]byte(text)); got != want {
			t.Errorf("%d nested arrays: got %v, want %v", depth, got, want)
		}
	}
}

// Strings are scanned many bytes at a time. No byte that matters may be missed, wherever it is.
func TestStringEnd(t *testing.T) {
	for n := range 80 {
		for _, filler := range []string{"x", "\x7f", "!", "#", "[", "]", "é"} {
			plain := strings.Repeat(filler, n)
			for end, want := range map[string]bool{`"`: true, `\""`: true, `\\"`: true, "\x1f\"": false, "\x00\"": false, "\x1f                \"": false, "\xff\"": false, "\xc3                \"": false, `\x"`: false, ``: false} {
				text := `"` + plain + end + plain
				want := map[bool]int{true: 1 + len(plain) + len(end), false: -1}[want]
				if got := skipString([]byte(text), 0); got != want {
					t.Errorf("%q: got %d, want %d", text, got, want)
				}
			}
		}
	}
}

func TestParseValues(t *testing.T) {
	for _, tt := range []struct {
		raw                string
		str                string
		number             float64
		isString, isNumber bool
	}{
		{raw: `"a"`, str: "a", isString: true},
		{raw: `""`, isString: true},
		{raw: `"\u00e9\n\/\ud83d\ude00"`, str: "é\n/😀", isString: true},
		{raw: `"\ud83d"`, str: "\ufffd", isString: true},
		{raw: `"1"`, str: "1", isString: true},
		{raw: `-0.5e1`, number: -5, isNumber: true},
		{raw: `0`, isNumber: true},
		{raw: `1e999`}, {raw: `null`}, {raw: `true`}, {raw: `{}`}, {raw: `["a"]`}, {raw: ``, isString: true}, // absent
	} {
		str, err := parseString([]byte(tt.raw))
		if str != tt.str || (err == nil) != tt.isString || err != nil && err != errFieldType {
			t.Errorf("parseString(%s): got %q, %v; want %q, a string: %v", tt.raw, str, err, tt.str, tt.isString)
		}
		number, err := parseNumber([]byte(tt.raw))
		if number != tt.number || (err == nil) != tt.isNumber || err != nil && err != errFieldType {
			t.Errorf("parseNumber(%s): got %v, %v; want %v, a number: %v", tt.raw, number, err, tt.number, tt.isNumber)
		}
	}
}

func TestObjectStr(t *testing.T) {
	o := object{"text": []byte(`"x"`), "empty": []byte(`""`), "null": []byte(`null`), "number": []byte(`1`)}
	for _, tt := range []struct {
		name, want string
		wantOK     bool
		wantErr    error
	}{
		{"text", "x", true, nil},
		{"empty", "", true, nil},
		{"absent", "", false, nil},
		{"Text", "", false, nil},
		{"null", "", false, errFieldType},
		{"number", "", false, errFieldType},
	} {
		if got, ok, err := o.str(tt.name); got != tt.want || ok != tt.wantOK || err != tt.wantErr {
			t.Errorf("%s: got %q, %v, %v; want %q, %v, %v", tt.name, got, ok, err, tt.want, tt.wantOK, tt.wantErr)
		}
	}
}

func TestReadJSON(t *testing.T) {
	const limit = 16
	brokenOff := io.MultiReader(strings.NewReader("{"), iotest.ErrReader(io.ErrUnexpectedEOF))
	for _, tt := range []struct {
		name, contentType string
		body              io.Reader
		wantErr           *apiError
		wantStatus        int // of writeError
	}{
		{"json", "application/json", strings.NewReader(`{}`), nil, 0},
		{"a parameter", "Application/JSON; charset=utf-8", strings.NewReader(`{}`), nil, 0},
		{"no type", "", strings.NewReader(`{}`), nil, 0},
		{"at the limit", "application/json", strings.NewReader(`{"a":"12345678"}`), nil, 0},
		{"beyond it", "application/json", strings.NewReader(`{"a":"123456789"}`), errBodyTooLarge, 413},
		{"a form", "application/x-www-form-urlencoded", strings.NewReader(`{}`), errMediaType, 415},
		{"text", "text/plain", strings.NewReader(`{}`), errMediaType, 415},
		{"json in name only", "application/jsonp", strings.NewReader(`{}`), errMediaType, 415},
		{"an empty parameter", "application/json;", strings.NewReader(`{}`), nil, 0},
		{"two types", "application/json, text/plain", strings.NewReader(`{}`), errMediaType, 415},
		{"no body", "application/json", strings.NewReader(``), errNotJSON, 400},
		{"broken off", "application/json", brokenOff, errBrokenOff, 408},
		{"bad chunks", "application/json", iotest.ErrReader(errors.New("malformed chunked encoding")), errNotJSON, 400},
		{"twice", "application/json", strings.NewReader(`{"a":1,"a":1}`), errDuplicate, 400},
	} {
		r := httptest.NewRequest(http.MethodPost, "/", tt.body)
		r.Header.Set("Content-Type", tt.contentType)
		w := httptest.NewRecorder()
		_, err := readJSON(w, r, limit)
		if tt.wantErr == nil {
			if err != nil {
				t.Errorf("%s: got error %v", tt.name, err)
			}
			continue
		}
		if err != tt.wantErr {
			t.Errorf("%s: got error %v, want %v", tt.name, err, tt.wantErr)
		}
		writeError(w, r, err)
		wantBody := fmt.Sprintf(`{"error":%q,"code":%q}`+"\n", tt.wantErr.Text, tt.wantErr.Code)
		if w.Code != tt.wantStatus || w.Body.String() != wantBody || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: got %d %q, want %d %q", tt.name, w.Code, w.Body, tt.wantStatus, wantBody)
		}
	}
}

// Our JSON is never part of a page, so HTML in it is not escaped.
func TestMarshal(t *testing.T) {
	const text = "<&>\u2028\n\"é"
	want := `"<&>\u2028\n\"é"`
	for name, got := range map[string][]byte{"marshal": marshal(text), "appendString": appendString(nil, text)} {
		if string(got) != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// Strings are encoded and decoded by code of our own where that is faster, so encoding/json must agree.
func FuzzString(f *testing.F) {
	f.Add("")
	f.Add(`{"text":"a\\b"}`)
	f.Add("\\\"\\")
	f.Add("\x00\xff\u2028é\n<")
	f.Fuzz(func(t *testing.T, text string) {
		standard, err := json.Marshal(text)
		must(t, err)
		want := decodeBoth(t, standard)
		if got := decodeBoth(t, appendString(nil, text)); got != want {
			t.Errorf("appendString(%q): got a JSON string for %q, want for %q", text, got, want)
		}
		if inside := []byte(`"` + text + `"`); json.Valid(inside) && utf8.Valid(inside) {
			decodeBoth(t, inside)
		}
	})
}

// decodeBoth decodes a JSON string with encoding/json, and checks that parseString agrees.
func decodeBoth(t *testing.T, raw []byte) string {
	t.Helper()
	var want string
	if err := json.Unmarshal(raw, &want); err != nil {
		t.Errorf("%s: %v", raw, err)
	}
	if got, err := parseString(raw); got != want || err != nil {
		t.Errorf("parseString(%s): got %q, %v; want %q", raw, got, err, want)
	}
	return want
}

// Objects are read by a parser of our own, which must agree with encoding/json on what is one, and on its members.
func FuzzParseObject(f *testing.F) {
	f.Add([]byte(`{"a":{"b":[1,"}",{"c":null}]},"d":"\"\\" , "e" : -1.5e3}`))
	f.Add([]byte(" {\t\"a\"\r\n:\n[ ] }\n"))
	f.Add([]byte(`{"a":1,"\u0061":2}`))
	f.Add([]byte(`{"c":1,"d":2,"\u0063":3}`))
	f.Add([]byte(`{"a":{"b":1,"c":2,"c":3},"d":4}`))
	f.Add([]byte(`{"a":1}{`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if bytes.Count(text, []byte("["))+bytes.Count(text, []byte("{")) > maxDepth {
			t.Skip() // encoding/json goes deeper
		}
		got, err := parseObject(text)
		want, wantErr := slowObject(text)
		if err != wantErr || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %q, %v; want %q, %v", text, got, err, want, wantErr)
		}
		var picked []byte
		err = pick(text, member{"a", &picked, []member{{"b", new([]byte), nil}}})
		if twiceInside := err == errDuplicate && wantErr == nil; err != wantErr && !twiceInside || err == nil && !bytes.Equal(picked, want["a"]) {
			t.Errorf("%q: picked %q, %v; want %q, %v", text, picked, err, want["a"], wantErr)
		}
	})
}

// slowObject is parseObject, but with the tokens of encoding/json.
func slowObject(text []byte) (object, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if start, err := dec.Token(); err != nil || start != json.Delim('{') || !utf8.Valid(text) || !json.Valid(text) {
		return nil, errNotJSON
	}
	o := object{}
	for dec.More() {
		name, _ := dec.Token()
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		if _, ok := o[name.(string)]; ok {
			return nil, errDuplicate
		}
		o[name.(string)] = value
	}
	return o, nil
}
