r"""Kinds of answers that graders get wrong: for each, answers that are right and near misses that are not.

A line is `reference answer <- content of the box`.
"""

import json
import re
from pathlib import Path

import pytest

from common.errors import UserError
from common.grading import RULES, Outcome
from common.grading.rule_gsm8k import grade as grade_gsm8k
from common.grading.rule_gsm8k import validate_gold as validate_gsm8k_gold
from common.grading.rule_math import extract_gold, grade, last_box, validate_gold

PUBLIC_CASES = Path(__file__).parents[2] / "shared" / "cases" / "public_grading.jsonl"
NOT_AS_EXPECTED: dict[str, str] = {}
"""Cases of that file that are graded otherwise than it expects: id and why."""

RIGHT = {
    "letter case": r"""
        \frac{R}{r} <- R/r
        R_1 <- R_{1}
        V=IR <- V = I R
        \{A, a\} <- \{a, A\}
        2Rr <- 2rR
        E=mc^2 <- mc^2
    """,
    "text beside a number": r"""
        10\% <- 10\%\text{ increase}
        10\% <- 0.1
        5 <- 5\text{ cm}
        5\text{ minutes} <- 5\text{ min}
        5\text{ minutes} <- 5
        5\text{ hours} <- 5\text{ hrs}
        12 <- 12\text{ ways}
        500 <- 5\text{ hundred}
        5000000 <- 5\text{ million dollars}
        5\text{ million} <- 5{,}000{,}000
        12\text{ apples} <- 12 apples
        \$5 <- 5\text{ dollars}
        3:30\text{ p.m.} <- 3:30\text{ PM}
        3:30\text{ p.m.} <- 3{:}30\ \mathrm{p.m.}
        15:30 <- 3:30\text{ p.m.}
        5\% <- 0.05
        0.05 <- 5\text{ percent}
        5\text{ or }6 <- 6, 5
        5,6 <- 5\text{ or 6}
        36 <- 3\text{ dozen}
        6\text{ ft} <- 6\text{ feet}
        12\text{ square cm} <- 12\text{ cm}^2
        5\text{ km/h} <- 5\text{ km per hour}
        50\text{ mph} <- 50\text{ miles per hour}
        5.4 \text{ cents} <- 5.4
        3\frac{1}{5} <- 3\frac{1}{5} \text{ cm}
        33\frac{1}{3}\% <- \frac13
        1/3 <- 33\frac13\%
        33\frac{1}{3}\% <- 33 1/3 percent
        33\frac13\% <- \frac{100}{3}\%
        -1/8 <- -12\frac12\%
        0.005 <- \frac12\%
        33\frac13\% <- 33\frac13
        16\frac23\% <- 16\frac23
        33\frac13\text{ percent} <- 33\frac13
        33\frac13 <- 33\frac13\%
        12.5 <- \frac{25}{2}\%
        \frac{25}{2}\% <- 12.5
        33.33\% <- 33.33
        0.005 <- 1/2\%
        1/2,1/3 <- 33\frac13\%, 50\%
        5\text{ square units} <- 5\text{ cm}^2
    """,
    "factors in brackets": r"""
        12 <- 3(4)
        12 <- (3)(4)
        12 <- 3\left(4\right)
        1320 <- 12(11)(10)
        6 <- (2)(3)
        24 <- 2(3)(4)
        12 <- 3\cdot(4)
        -12 <- -3(4)
        12 <- (3)4
        18 <- 3\binom{4}{2}
        7/2 <- 3\frac12
        5/2 <- 2\left(\frac{5}{4}\right)
        8 <- \frac{4}{2}(4)
        20 <- 2(3+7)
        15 <- 3(4)+3
        -7/2 <- -3\frac{1}{2}
    """,
    "times of a day": r"""
        5:45\text{ a.m.} <- 5:45\text{ AM}
        \text{4:30 p.m.} <- 4:30\text{ p.m.}
        \text{1:03 PM} <- 1:03
        3:30 <- 3{:}30
        2:3 <- 4:6
        2:3 <- \frac23
        7:05 <- 7{:}05
        12:00\text{ p.m.} <- 12\text{ p.m.}
        00:15 <- 12:15\text{ a.m.}
        1:2:3 <- 2:4:6
        3:2 <- 3\colon 2
    """,
    "order and names": r"""
        x=1,y=2 <- y=2,x=1
        x=1,y=2 <- 1,2
        x=1,y=2 <- (1,2)
        x=1,y=2 <- x=1\text{ and }y=2
        (x,y)=(1,2) <- x=1,y=2
        x=1,y=2 <- (x,y)=(1,2)
        x=1,x=2 <- 2,1
        x=1\text{ or }x=2 <- x=2\text{ or }x=1
        p=5,q=2;p=7,q=2 <- p=7,q=2;p=5,q=2
        LQSX <- LQSX
        LQSX <- \text{LQSX}
        \text{CBAD} <- CBAD
        ac <- ca
        xy <- yx
        (1,2) <- x=1,y=2
        1,2 <- 2,1
        \alpha=1,\beta=2 <- \beta=2,\alpha=1
        x=1,y=\frac12 <- x=1,y=0.5
        x=1,y=2 <- \begin{cases} x=1 \\ y=2 \end{cases}
        x=1,y=2,z=3 <- (1,2,3)
    """,
    "equations with functions and logarithms": r"""
        3 <- f(2)=3
        3 <- \lim_{x\to 2} f(x)=3
        5 <- C(5,1)=5
        10 <- \binom{5}{2}=10
        3 <- f'(2)=3
        3 <- g(f(1))=3
        3 <- \log_2 8
        3 <- \log_2 8 = 3
        \log_2 3 <- \frac{\ln 3}{\ln 2}
        2 <- \log_{10} 100
        4 <- 2^2
        8 <- f(2)^3 = 8
        1/2 <- P(3)=\frac{1}{2}
        f(2)=3 <- 3
        \log_3 9 <- 2
        2 <- \log_{3}9=2
        120 <- 5!=120
        6 <- \gcd(12, 18)=6
        \log_2 100 <- \frac{2}{\log_{10} 2}
    """,
    "powers of ten": r"""
        6.02e23 <- 6.02 \times {10}^{23}
        1.5e-3 <- 0.0015
        2**10 <- 1024
        4.5e33 <- 4.5\times10^{33}
        4.5e33 <- 4.5\cdot 10^{33}
        4.5e33 <- 4.5*10^33
        4.5e33 <- 4.5 × 10³³
        4.5e33 <- 4.5E33
        4.5e33 <- 4.5e+33
        1500 <- 1.5e3
        1e-05 <- 0.00001
        1e-05 <- 10^{-5}
        1e+22 <- 10^{22}
        3e8 <- 3\times 10^8 \text{ m/s}
        3e8 <- 3 \times 10^{8}\ \mathrm{m/s}
        2.88e-19 <- 2.88\times 10^{-19}\,\text{J}
        1.325e-27 <- 1.325 \times 10^{-27}
        4.5\times10^{33} <- 4.5e33
        -1.5e3 <- -1500
        7e37 <- 7\times10^{37}
        4e33 <- 4.0\times 10^{33}
        1e-5 <- \frac{1}{100000}
        3.8e7 <- 38,000,000
        1e11 <- 100000000000
        6.5e-2 <- 0.065
        1.70e4 <- 17000
        4.5e33 <- x = 4.5\times 10^{33}
        4.5e33 <- \approx 4.5\times 10^{33}
    """,
    "plain notation": r"""
        abs(x+1)/2 <- \frac{|x+1|}{2}
        floor(x/2) <- \lfloor x/2\rfloor
        ln(2)/2 <- \frac{\ln 2}{2}
        2*pi*r <- 2\pi r
        7*sin(pi*x/5)+1 <- 7\sin\left(\frac{\pi x}{5}\right)+1
        sqrt(2)/2 <- \frac{\sqrt{2}}{2}
        x**2+1 <- x^2+1
        x^(1/2) <- \sqrt{x}
        e^(-x) <- e^{-x}
        exp(-x) <- e^{-x}
        ln(a)*a^x <- a^x\ln a
        pi/4 <- \frac{\pi}{4}
        sqrt(x^2+1) <- \sqrt{x^2+1}
        sqrt((x+1)*(x-1)) <- \sqrt{x^2-1}
        3*x^2-2*x <- 3x^2-2x
        arctan(1) <- \frac{\pi}{4}
        np.arcsin(10/13) <- \arcsin\frac{10}{13}
        -1./3 <- -\frac13
        (a+b)/(c-d) <- \frac{a+b}{c-d}
        2*theta <- 2\theta
        cos(2*t)/15 <- \frac{\cos (2t)}{15}
        sin(x)^2 <- \sin^2 x
        \frac{1}{2a}(\exp{a*t} - \exp{-a*t}) <- \frac{e^{at}-e^{-at}}{2a}
        alpha+beta <- \alpha+\beta
        x^2*y <- y x^2
    """,
    "units and counting words": r"""
        5 <- 5千克
        5 <- 5\text{千米}
        50000 <- 5\text{万元}
        64 <- 64 sq ft
        9.8 <- 9.8 m/s^2
        9.8 <- 9.8\ \mathrm{m\cdot s^{-2}}
        5 <- 5\,\Omega
        100 <- 100 degrees Fahrenheit
        \frac{3}{4} <- \frac{3}{4}\text{ of the pie}
        64 <- 64 square feet
        64 <- 64\ cm^2
        12 <- 12\ \mathrm{N}
        12 <- 12 apples
        42 <- 42\text{个}
        42 <- 42元
        5 <- 5^{\text{th}}
        5 <- 5th
        5 <- 5^{th}
        5 <- €5
        5 <- 5€
        5 <- \pounds 5
        5 <- 5\,\mathrm{m\,s^{-1}}
        5 <- 5\ \text{m}/\text{s}
        5 <- 5\,\text{kg}\cdot\text{m}^2
        5 <- 5\ \frac{\text{m}}{\text{s}}
        5 <- 5\,\mathrm{kg\,m^2/s^2}
        5 <- 5\ ^\circ\text{C}
        25 <- 25°C
        74^\circ <- 74°
        74^\circ <- 74\text{ degrees}
        74 <- 74^\circ
        3\sqrt{2} <- 3\sqrt{2}\text{ cm}
        \frac{1}{2} <- \frac12\text{ hour}
        5 <- 5 meters
        5 <- 5 km
        5 <- 5km
        12 <- 12\text{ different ways}
        12 <- 12 possible arrangements
        64\pi <- 64\pi \text{ cubic inches}
        x <- x\text{ cm}
        5 <- 5\ \text{V}
        100 <- 100\text{ mL}
        1 <- 1^{\text{st}}
        2 <- 2\text{nd}
        5 <- 5 hours
        12 <- 12 people
        20 <- 20 m/s
        5\text{ m} <- 5 meters
        5 <- 5 \text{ cm}.
        18\text{ cm}, 6\text{ cm} <- 18, 6
        1.6 \mathrm{~cm} <- 1.6
        \$32.50 <- 32.5
        32.50 <- \$32.50
        42 <- 42 \text{ 元}
    """,
    "Unicode": r"""
        74^\circ <- 74°
        \sqrt{2} <- √2
        x^2 <- x²
        x^{12} <- x¹²
        \infty <- ∞
        -3 <- –3
        -3 <- −3
        6 <- 2·3
        6 <- 2×3
        (1,2) <- （1，2）
        50\% <- 50％
        \frac{1}{2} <- ½
        2.5 <- 2½
        x\le 2 <- x≤2
        x\ge 2 <- x≥2
        \pi <- π
        2\pi r <- 2πr
        \emptyset <- ∅
        (-\infty,1]\cup[2,\infty) <- (−∞,1]∪[2,∞)
        \sqrt{x+1} <- √(x+1)
        3\sqrt{5} <- 3√5
        42 <- ４２
        x_1 <- x₁
        \mathbb{R} <- ℝ
        \theta <- θ
        \frac{\pi}{3} <- π⁄3
        \frac{\pi}{3} <- π/3
        x=5 <- x＝5
        -\frac12 <- −½
        5 <- 5。
        12 <- 3 ⋅ 4
        2^{n} <- 2ⁿ
        2^{-1} <- 2⁻¹
        \sqrt[3]{2} <- ∛2
        1,2 <- 1、2
        x\ne 1 <- x≠1
        42 <- 𝟒𝟐
    """,
    "LaTeX spellings": r"""
        \frac{1}{2} <- \\frac{1}{2}
        \begin{bmatrix}1&2\\3&4\end{bmatrix} <- \left[\begin{matrix}1&2\\3&4\end{matrix}\right]
        \begin{pmatrix}1\\2\end{pmatrix} <- \left[\begin{smallmatrix}1\\2\end{smallmatrix}\right]
        \emptyset <- \{ \}
        x^{-1} <- x^-1
        \frac{1}{10} <- \frac1{10}
        5 <- 5\textsuperscript{th}
        \frac{a}{b} <- \frac a b
        \sqrt{x} <- x^\frac12
        \frac{1}{3} <- 0.\overline{3}
        0.\overline{3} <- \frac13
        0.1\overline{6} <- \frac16
        1.\overline{27} <- \frac{14}{11}
        \emptyset <- \varnothing
        \emptyset <- \{\}
        x=1,y=2 <- \begin{cases}x=1\\y=2\end{cases}
        x=1,y=2 <- \left\{\begin{array}{l}x=1\\y=2\end{array}\right.
        (1,2) <- \langle 1,2\rangle
        10 <- {5\choose2}
        10 <- \dbinom52
        5 <- \color{red}{5}
        5 <- \textcolor{blue}{5}
        5 <- {\color{red}5}
        5 <- \[5\]
        5 <- 5\\
        5 <- **5**
        5 <- *5*
        x>2 <- \{x\mid x>2\}
        (2,\infty) <- \{x\mid x>2\}
        (2,\infty) <- \{x : x>2\}
        4210_5 <- (4210)_5
        4210_5 <- 4210_{\text{five}}
        4210_5 <- 4210_{(5)}
        \frac{1}{2} <- {1\over2}
        \frac{1}{2} <- \cfrac12
        \begin{pmatrix}1\\2\end{pmatrix} <- \left(\begin{array}{c}1\\2\end{array}\right)
        \begin{pmatrix}1\\2\end{pmatrix} <- \begin{bmatrix}1\\2\end{bmatrix}
        5 <- \boldsymbol{5}
        5 <- \mathbf{5}
        5 <- \bm{5}
        \frac{\pi}{2} <- \frac\pi2
        \sqrt{3} <- \sqrt3
        \sqrt{ab} <- \sqrt{a b}
        2\sqrt{3} <- 2\sqrt 3
        x^{10} <- x^10
        \{1,2\} <- \lbrace 1,2\rbrace
        [1,2] <- \lbrack 1,2\rbrack
        |x| <- \lvert x\rvert
        |x| <- \left|x\right|
        x \le 2 <- x\leqslant 2
        5 <- \underline{5}
        5 <- \ensuremath{5}
        5 <- \boxed{5}
        5 <- \displaystyle 5
        10^{10} <- 10^{10}.
        2 <- \tfrac{4}{2}
        1+2i <- 1+2\,\mathrm{i}
        \frac12 <- \sin 30^\circ
        \frac{\sqrt3}{2} <- \cos(30^\circ)
        \frac12 <- \sin\left(30^\circ\right)
        x\in\{1,2\} <- \{1,2\}
        1,2 <- 1\text{ and }2
        1,2 <- x=1\text{ or }x=2
        \mathbb{R} <- (-\infty,\infty)
        5 <- {5}
        5 <- \text{5}
        1,-1 <- \pm 1
        \frac{1\pm\sqrt5}{2} <- \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}
        2\sqrt{3},-2\sqrt3 <- \pm2\sqrt3
        (-1)^2 <- 1
        5 <- \hspace{1cm}5
        5 <- \phantom{0}5
        5 <- \,5\,
    """,
    "relations turned round": r"""
        x \le -1 \text{ or } x \ge 3 <- (-\infty,-1]\cup[3,\infty)
        (-\infty,-1]\cup[3,\infty) <- x \le -1 \text{ or } x \ge 3
        (-\infty, 2) \cup (2, \infty) <- \{x \mid x \neq 2\}
        a<b<c <- c>b>a
        1<x<3 <- 3>x>1
        1<x<3 <- (1,3)
        1<x\le3 <- 3\ge x>1
        x>2 <- 2<x
        2<x <- x>2
        2=x <- 2
        x=2 <- 2=x
        2 <- 2=x
        x\ge 2 <- [2,\infty)
        [2,\infty) <- x\ge2
        (1,3) <- 1<x<3
        y=2x+1 <- 2x+1=y
        x<1\text{ or }x>3 <- x>3\text{ or }x<1
        x \neq 2 <- 2\neq x
    """,
    "words and introductions": r"""
        A <- \text{Option A}
        1,2 <- x=1或x=2
        3 <- \text{解得 }x=3
        5 <- 最终答案是 5
        \text{ellipse} <- \text{an ellipse}
        5 <- \text{\textbf{5}}
        5 <- \mathbf{\text{5}}
        5 <- \Large 5
        5 <- = 5
        \text{does not exist} <- \text{Does not exist}
        5 <- \text{Answer: }5
        5 <- \text{The answer is }5
        42 <- \text{答案是} 42
        5 <- The answer is 5
        5 <- Answer: 5
        2x <- f(x)=2x\text{ for all }x
        f(x)=2x <- f(x)=2x\text{ for all real }x
        f(x)=2x <- f(x)=2x, \forall x\in\mathbb{R}
        f(x)=2x <- f(x)=2x\text{ for all } x\in\mathbb{R}
        5 <- \text{Area} = 5
        5 <- \text{Area: }5
        \text{odd} <- odd
        \text{Yes} <- yes
        \text{no solution} <- \text{No solution}
        True <- \text{True}
        \text{True} <- true
        \text{(A)} <- A
        A <- \textbf{(A)}
        \text{A, B} <- A,B
        \text{A,C,F} <- \text{F, C, A}
        \text{east} <- \text{East}
        74 <- \angle ABC = 74^\circ
        30 <- m\angle A=30^\circ
        Tuesday <- \text{Tuesday}
        \text{June 20} <- June 20
        5 <- \text{So the total is } 5
        1-\frac1{\mathrm e} <- 1-\frac1e
        \mathrm{i} <- i
        e^{\mathrm{i}\pi} <- -1
        -1 <- i^2
        2i <- (1+i)^2
    """,
    "further forms": r"""
        x+iy <- x+i y
        x+iy <- x+yi
        (1+i)(1-i) <- 2
        \sum_{i=1}^{3} i <- 6
        e^{2 i t} <- e^{2it}
        Mgh <- M g h
        \frac{1}{3} E_{1}+\frac{2}{3} E_{2} <- \frac{E_1+2E_2}{3}
        M_\odot <- M_{\odot}
        \hbar\omega <- \omega\hbar
        \begin{pmatrix}1&-1\\1&-1\end{pmatrix} <- \begin{pmatrix} 1 & -1 \\ 1 & -1 \end{pmatrix}
        8\% <- 8 \%
        8\% <- 8\,\%
        \frac34 <- P(A)=\frac{3}{4}
        3 <- E(X)=3
        3 <- \mathbb{E}[X]=3
        4 <- \operatorname{Var}(X)=4
        5 <- |AB|=5
        12 <- [ABC]=12
        5 <- \overline{AB}=5
        12 <- S_{\triangle ABC}=12
        55 <- a_{10}=55
        1/2 <- \int_0^1 x\,dx=\frac12
        1/2 <- \int_0^1 x\,\mathrm{d}x=\frac12
        3 <- \lim_{n\to\infty} a_n = 3
        3 <- \min\{a,b\}=3
        3 <- f_{\max}=3
        5 <- x_1+x_2=5
        5 <- \vec{a}\cdot\vec{b}=5
        1/2 <- \cos 60^\circ=\frac12
        x>2 <- \left\{x \,\middle|\, x>2\right\}
        x>2 <- \{x|x>2\}
        x>2 <- \{ x \in \mathbb{R} : x > 2 \}
        \text{June 20} <- \text{june 20}
        \text{Alice}=3,\text{Bob}=4 <- \text{Bob}=4,\text{Alice}=3
        f(1)=2,f(2)=3 <- f(2)=3,f(1)=2
        V=\pi r^2, S=2\pi r <- S=2\pi r,V=\pi r^2
        \mathbb{R} <- \R
        30^\circ <- 30^{\circ}
        A^{T} <- A^{\mathrm{T}}
        5 <- 5 m/s
        12 <- 12 cubic feet
        50 <- 50 mph
        x^{\prime}+x=0 <- x'+x=0
        \sqrt{2} <- \sqrt 2
        6 <- \gcd(12,18)=6
        12 <- \operatorname{lcm}(4,6)=12
        3,4 <- \{3,4\}
        \text{5 apples} <- 5
        17 <- 17\text{ any text}
        180 <- 180\text{ square centimeters}
        20\text{ cm} <- 20\mbox{ centimeters}
        \frac{1}{2}\text{ hour} <- 0.5\text{ hours}
        10!  <- 3628800
        [0,1) <- 0\le x<1
        -\frac{\sqrt{3}}{2} <- -\frac{1}{2}\sqrt{3}
        \frac{\sqrt3}{3} <- \frac{\sqrt3}{3} \approx 0.577
        \frac{\sqrt3}{3} <- \frac{\sqrt3}{3} \approx 0.577...
        \frac13 <- \frac13 \approx 0.333\ldots
        \frac13,1 <- \frac13 \approx 0.333\ldots, 1
        \pi <- \pi \approx 3.14159...
        \frac{n(n+1)}{2} <- 1+2+\cdots+n=\frac{n(n+1)}{2}
        n! <- 1\cdot2\cdots n=n!
        2 <- 1+\frac12+\frac14+\ldots=2
        0.\overline{142857} <- 0.\overline{142857}...
        \text{yes} <- \text{yes}...
        \text{yes} <- \text{yes...}
        \text{yes} <- yes…
        \text{Bob} <- \text{The answer is Bob...}
        1,2 <- \{2,1\}
        \{1,2\} <- 1,2
        \{(1,2),(3,4)\} <- (1,2),(3,4)
        \{(1,2),(3,4)\} <- [(1,2),(3,4)]
        \{1,2,3\} <- [1, 2, 3]
        (2,3) <- 2,3
    """,
}

WRONG = {
    "letter case": r"""
        aA <- a^2
        P(A) <- P(a)
        A=3,B=4 <- a=3,b=4
        \frac{R}{r} <- 1
        R_1 <- r_1
        x+X <- 2X
        I^2 <- -1
        e <- E
        E <- e
        \{R_1\} <- \{r_1\}
        x=R <- x=r
        m M <- M^2
        A+a <- 2a
        I_1 <- I_2
        \sin A <- \sin a
        N n <- n^2
        (R,r) <- (r,R)
        R>r <- r>r
    """,
    "text beside a number": r"""
        10\% <- 10\text{ edges}
        52\% <- 52^\circ
        17\text{ meters} <- 17\%
        5 <- 5\text{ or so}
        5 <- 5\text{ (not sure)}
        5 <- 5\text{ and a half}
        5\text{ kg} <- 5\text{ lb}
        30^\circ\text{C} <- 30^\circ\text{F}
        5\text{ students} <- 5\text{ teachers}
        5\text{ communities} <- 5\text{ dollars}
        3\text{ hours} <- 3\text{ opportunities}
        \frac13 <- 33\frac13
        33\frac13\% <- 33\frac12\%
        50 <- 1/2\%
        0.5 <- \frac12\%
        0.5 <- 0.5\%
        0.5 <- 50
        33\frac13\% <- 33\frac12
        33.33\% <- 33.34
        50\% <- 50\text{ dollars}
        5 <- 5\text{ or 6}
        5 <- 5\text{ or more}
        5 <- 5\text{ and 6}
        5 <- 5\text{ thousand}
        5 <- 5\text{ dozen}
        5\text{ minutes} <- 5\text{ hours}
        5\text{ cm} <- 5\text{ m}
        5\text{ cm}^2 <- 5\text{ cm}^3
        5\text{ cm} <- 5\text{ cm}^2
        75\text{ cents} <- \$75
        75\text{ cents} <- 75\text{ dollars}
        5\% <- 0.05\text{ percent}
        3:30\text{ p.m.} <- 3:30\text{ a.m.}
        3\text{ p.m.} <- 3\text{ a.m.}
        5 <- 5\text{ is not the answer}
        5 <- 5\text{ (or 6)}
        5 <- 5\text{ if }x>0
        5 <- 5\text{ to 6}
        5 <- 5\text{ plus one}
        5 <- 5\text{ squared}
        5 <- 5\text{ factorial}
        5 <- \text{not }5
        5 <- \text{at least }5
        5 <- \text{less than } 5
        5 <- 5\text{ at most}
        5 <- 5\text{ tenths}
        5 <- 5\text{ halves}
        5 <- 5\text{ + 1}
        5 <- 5\text{, 6}
        5\text{ boys} <- 5\text{ girls}
        5 <- 5\text{万}
        5 <- 5\text{或}6
        5 <- 5\text{ approximately}
        5\text{ km/h} <- 5\text{ km}
        5\text{ m/s} <- 5\text{ m/s}^2
        €5 <- \$5
        5 <- 5\text{ times } 7
        5 <- 5\text{ mod }7
        5\text{ degrees} <- 5\text{ radians}
        5 <- \text{minus } 5
        5 <- 5\text{ below zero}
        5 <- 5 million
        5 <- 5 or 6
        5 <- 5 or more
        5 <- \text{The answer is not }5
        5 <- \text{either }5\text{ or }6
    """,
    "factors in brackets": r"""
        7 <- 3(4)
        5 <- (2)(3)
        33 <- 12(11)(10)
        7/2 <- 3\left(\frac12\right)
        9 <- 3\binom{4}{2}
        6 <- \frac{4}{2}(4)
        3/2 <- 3\frac{1}{2}
        7 <- 3\cdot 4
    """,
    "times of a day": r"""
        5:45\text{ a.m.} <- 1:9
        3:30\text{ p.m.} <- 1:10
        12:50 <- 6:25
        4:30 <- 2:15
        4:30\text{ p.m.} <- 4:30\text{ a.m.}
        5:45\text{ a.m.} <- \frac{1}{9}
        1:2:3 <- 1:6
        1:2:3 <- \frac16
        1:2:3 <- 3:2:1
        2:3 <- 3:2
        10:20 <- 5:10
        16:30 <- 4:30\text{ a.m.}
    """,
    "order and names": r"""
        x_1=1,x_2=2 <- 2,1
        a=1,b=2 <- b=1,a=2
        PQR <- RQP
        x=1,y=2 <- 2,1
        x=1,y=2 <- (2,1)
        x=1,y=2 <- x=2,y=1
        x=1,y=2 <- y=1,x=2
        x=1,y=2 <- a=1,b=2
        x=1,y=2 <- x=1
        x=1,y=2 <- 1
        x=1,y=2 <- 1,2,3
        LQSX <- XSQL
        LQSX <- LQS
        MAKE <- KAME
        p=5,q=2;p=7,q=2 <- p=5,q=7;p=2,q=2
        (1,2) <- (2,1)
        \text{CBAD} <- DABC
        \text{ACF} <- \text{AFC}
        x=1,y=2,z=3 <- (1,3,2)
    """,
    "equations with functions and logarithms": r"""
        3 <- f(2)=4
        3 <- 2=3
        3 <- f(3)=2
        3 <- \log_2 9 = 3
        5 <- C(5,1)=6
        3 <- \log_2 9
        10 <- \binom{5}{2}=11
        5 <- 4 = 5
        5 <- f(1)=4=5
        5 <- 2+2=5
    """,
    "powers of ten": r"""
        4.5e33 <- 4.5\times10^{32}
        4.5e33 <- 4.5
        4.5e33 <- 4.6\times10^{33}
        1500 <- 1.5e2
        1e-05 <- 1e-06
        1e-05 <- 0
        2e <- 2e1
        1e22 <- 1e21
        10^{11} <- 99999999999
        1e-5 <- 2e-5
        4.5e33 <- 4.5e-33
        5 <- 5e
    """,
    "plain notation": r"""
        2*pi*r <- 2\pi r^2
        7*sin(pi*x/5)+1 <- 7\sin(\pi x/5)
        sqrt(2)/2 <- \sqrt{2}
        x**2 <- 2x
        x**2 <- x^3
        e^(-x) <- e^{x}
        ln(a)*a^x <- a^x
        pi <- p
    """,
    "units and counting words": r"""
        64 <- 65 square feet
        12 <- 13\ \mathrm{N}
        5 <- 5x
        4 <- 4t
        4 <- 4\text{t}
        5 <- 6^{\text{th}}
        5 <- 5abc
        2 <- 2 abc
        5 <- 5xy
        64 <- 64^2
        5 <- 5!
        2 <- 2\sin x
        2 <- 2 sin x
        2 <- 2 pi
        2 <- 2\mathrm{e}
        2 <- 2\mathrm{i}
        5 <- \mathrm{N}
        3 <- 3\text{A}\text{B}x
        5 <- 5 dozen
        5\text{ m} <- 5 feet
        64\text{ square feet} <- 64\text{ square inches}
        5^\circ <- 5\text{ radians}
    """,
    "Unicode": r"""
        3 <- −3
        \sqrt{2} <- √3
        x^2 <- x³
        x^2 <- x2
        \frac12 <- ⅓
        x^{2} <- x₂
        (1,2) <- （1，2]
        5 <- 5²
        50\% <- 5％
    """,
    "LaTeX spellings": r"""
        \frac{1}{10} <- \frac{1}{1}0
        x^{-1} <- x-1
        \begin{bmatrix}1&2\\3&4\end{bmatrix} <- \left[\begin{matrix}1&3\\2&4\end{matrix}\right]
        \frac{a}{b} <- \frac b a
        \sqrt{x} <- x^\frac13
        \frac{1}{3} <- 0.\overline{4}
        \frac{1}{3} <- 0.3
        0.\overline{3} <- 0.3
        0.\overline{12} <- 0.1\overline{2}
        \emptyset <- \{0\}
        \emptyset <- \{\emptyset\}
        \emptyset <- 0
        10 <- {5\choose1}
        (1,2) <- \langle 2,1\rangle
        5 <- \color{red}{6}
        x>2 <- \{x\mid x<2\}
        x>2 <- \{x\mid x\ge2\}
        4210_5 <- (4210)_6
        4210_5 <- 4210_{\text{six}}
        \begin{pmatrix}1\\2\end{pmatrix} <- \left(\begin{array}{c}2\\1\end{array}\right)
        x=1,y=2 <- \begin{cases}x=2\\y=1\end{cases}
        \frac12 <- \sin 60^\circ
        43 <- 43_5
        5 <- \pm 5
    """,
    "relations turned round": r"""
        (-\infty,-1]\cup[3,\infty) <- x < -1 \text{ or } x \ge 3
        (-\infty,-1]\cup[3,\infty) <- x \ge 3
        1<x<3 <- 1<y<3
        1<x<3 <- 3>x>2
        1<x<3 <- 3<x<1
        1<x<3 <- 1\le x\le3
        1<x<3 <- 1>x>3
        x>2 <- 2>x
        x>2 <- x<2
        2=x <- 3
        2=x <- 3=x
        (1,3) <- 1\le x<3
        [2,\infty) <- x>2
        x>2 <- 2
        x=2 <- y=2
    """,
    "words and introductions": r"""
        A <- \text{Option B}
        1 <- x=1或x=2
        \text{even} <- \text{not even}
        5 <- \text{no more than }5
        5 <- \text{between }4\text{ and }5
        5 <- \text{approximately }5
        5 <- \text{Answer: }6
        5 <- \text{The answer is not }5
        2x <- f(x)=3x\text{ for all }x
        f(x)=2x <- f(x)=2x\text{ for all }x>0
        \text{odd} <- even
        \text{Yes} <- no
        \text{no solution} <- \text{one solution}
        True <- False
        A <- \text{B}
        \text{A, B} <- A
        \text{June 20} <- \text{June 21}
        \text{east} <- \text{west}
        1-\frac1{\mathrm e} <- 1+\frac1e
        i <- -i
        notfoundx <- n
        \text{Tuesday} <- Thursday
    """,
    "further forms": r"""
        x+iy <- x-iy
        x+iy <- x+y
        \sum_{i=1}^{3} i <- 3i
        \infty <- -\infty
        Mgh <- mgh
        E_1 <- E_2
        I_1 <- I_2
        \frac{1}{3} E_{1}+\frac{2}{3} E_{2} <- \frac{1}{3} E_{2}+\frac{2}{3} E_{1}
        4.5e500 <- 1.5e600
        \text{Alice}=3,\text{Bob}=4 <- 4,3
        \text{Alice}=3,\text{Bob}=4 <- \text{Alice}=4,\text{Bob}=3
        f(1)=2,f(2)=3 <- 3,2
        f(1)=2,f(2)=3 <- f(1)=3,f(2)=2
        V=\pi r^2, S=2\pi r <- 2\pi r, \pi r^2
        5 <- 5\text{xy}
        5 <- 5\text{ish}
        5 <- 5\text{ tens}
        5 <- 5\text{?}
        5 <- 5 squared
        5 <- 5 factorial
        5 north <- 5 south
        12\text{ K} <- 12\text{ J}
        8\% <- 80\%
        y''+y=0 <- y'+y=0
        1,2,3 <- 1,2
        (1,2,3) <- (3,2,1)
        5 <- 5\text{ rejected}
        5 <- x=\text{ not }5
        5 <- \text{ approximately } 5
        5 <- 5^{2}\text{ cm}
        1,2,3 <- 1,2,3,\ldots
        1,2 <- 1,2,\dots
        1,2,10 <- 1,2,\ldots,10
        12 <- 12\ldots
        12 <- 12 \cdots
        5 <- 5...
        5 <- 5…
        5 <- 5\text{...}
        5 <- 5\text{ dollars...}
        8 <- 1+2+\ldots+5
        3 <- 12\ldots\approx 3
        12 <- 12\ldots\approx 12
        6 <- 1+2+\ldots+3=7
        \text{yes} <- \text{no...}
        (2,3) <- \{2,3\}
        \{2,3\} <- (3,2)
        [2,3] <- \{2,3\}
        \{2,3\} <- [2,3]
        \{1,2,3\} <- (1,2,3)
        \{1,2,3\} <- [1,2,4]
        (1,2) <- x\in\{1,2\}
    """,
}


def lines(table: dict[str, str]) -> list[tuple[str, str]]:
    pairs = [tuple(line.split(" <- ")) for block in table.values() for line in block.strip().splitlines()]
    return [(answer.strip(), box.strip()) for answer, box in pairs]


def boxed(box: str, answer: str) -> Outcome:
    return grade("", rf"so \boxed{{{box}}}.", answer).outcome


@pytest.mark.parametrize(("answer", "box"), lines(RIGHT))
def test_an_answer_that_says_the_same_is_correct(answer: str, box: str) -> None:
    assert boxed(box, answer) is Outcome.CORRECT


@pytest.mark.parametrize(("answer", "box"), lines(WRONG))
def test_an_answer_that_says_something_else_is_not_correct(answer: str, box: str) -> None:
    assert boxed(box, answer) in (Outcome.WRONG, Outcome.UNPARSED)


@pytest.mark.parametrize("answer", sorted({answer for table in (RIGHT, WRONG) for answer, _ in lines(table)}))
def test_each_reference_answer_of_these_tables_can_be_used(answer: str) -> None:
    assert validate_gold(answer) is None
    assert boxed(answer, answer) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("NaN", "missing answer"),
        ("None", "missing answer"),
        ("null", "missing answer"),
        ("N/A", "missing answer"),
        ("Proof.", "missing answer"),
        ("notfound", "missing answer"),
        ("We prove that x is even", "prose"),
        ("The function is even", "prose"),
        ("$f(x)=ax+b$, where $b$ is an arbitrary integer", "prose"),
        ("['3', '4']", "written as text"),
        ("3 4", "cannot parse"),
        (r"\frac{", "cannot parse"),
        (r"1,2,\ldots", "cannot parse"),
        ("0.333...", "cannot parse"),
        ("1+" * 300 + "1", "longer than 512"),
    ],
)
def test_a_reference_answer_that_cannot_be_meant_is_refused_with_the_reason(gold: str, reason: str) -> None:
    assert reason in str(validate_gold(gold))


@pytest.mark.parametrize("gold", [r"1,2,\ldots", "1,2,...", r"x=1\ldots", r"f(n)=1+2+\cdots+n"])
def test_a_reference_answer_with_an_ellipsis_is_read_by_no_answer(gold: str) -> None:
    assert validate_gold(gold) is not None
    for box in (gold, "2,1,...", "1,2"):
        assert boxed(box, gold) is Outcome.GOLD_UNPARSED


@pytest.mark.parametrize(
    ("gold", "box"),
    [
        ("1e-05", r"10^{-5}"),
        ("1e+22", r"10^{22}"),
        ("True", r"\text{True}"),
        ("The answer is 42", "42"),
        ("Tuesday", r"\text{Tuesday}"),
        (r"\text{None}", r"\text{none}"),
        ("inf", r"\infty"),
    ],
)
def test_a_reference_answer_that_looks_odd_is_read_as_it_is_meant(gold: str, box: str) -> None:
    assert validate_gold(gold) is None
    assert boxed(box, gold) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{42}. (Marked with \boxed as asked.)", "42"),
        (r"\boxed{42} (in a `\boxed` command)", "42"),
        (r"\boxed{42}, as I said with \boxed.", "42"),
        (r"\boxed{42}, I use \boxed a second time", "42"),
        (r"\fbox{42}", "42"),
        (r"\fbox{43}, no: \boxed{42}", "42"),
        (r"\boxed{43}, no: \fbox{42}", "42"),
        (r"\boxed 17", "17"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{42} and \boxed{}", ""),
        (r"\boxed{42} and \boxed{43", None),
        (r"the command \boxed is for answers", None),
        (r"\boxedly{3}", None),
    ],
)
def test_a_box_that_is_only_talked_about_is_none(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_boxes_with_equal_numbers_are_one_answer() -> None:
    assert extract_gold(r"so \boxed{15\frac{39}{40}}, or \boxed{\frac{639}{40}}") == r"\frac{639}{40}"
    with pytest.raises(UserError, match="several different"):
        extract_gold(r"so \boxed{15\frac{39}{40}}, or \boxed{\frac{639}{41}}")


@pytest.mark.parametrize(
    "answer",
    [
        "72",
        "$72",
        r"\$72",
        r"\$72.00",
        "$72.00",
        "US$72",
        "€72",
        "£72",
        "¥72",
        "72€",
        "`72`",
        "_72_",
        "**72**",
        "**$72**",
        "$72$",
        r"\(72\)",
        r"\[72\]",
        r"\boxed{72}",
        r"\boxed{\$72}",
        r"\text{72}",
        "７２",
        "72.",
        "72 or so",
        "72; the rest is Tom's",
        "72, that is all",
        "72 and that is all",
        "72 times",
        "72 (seventy-two)",
        "72 (2 each)",
        r"72\text{ kg}",
        r"72\%",
        "72x",
        "72 (48 + 24)",
        "72 (48+24=72)",
        "72 ($6 * 12$)",
        "72 (72)",
        "72 (100%)",
        "72 ()",
        "72 ($)",
        "72(¢)",
        r"72 \checkmark",
        r"72 $\blacksquare$",
        r"72\end{align}",
        r"72 \textsf{ cm}",
        r"72 \text {cm}",
        r"72 \mathrm {cm}",
        r"72 \operatorname{cm}",
        r"72\circ",
        r"72 \degree",
        r"72\textdollar",
        r"72 \cents",
        r"72 \percent",
        r"72 \thinspace cm",
        r"72\n",
        r"72\nSo 72",
        "72 M&Ms",
        "72 M's",
        "72 M’s",
        "72 squared meters",
    ],
)
def test_gsm8k_reads_the_marks_that_models_put_around_a_number(answer: str) -> None:
    assert grade_gsm8k("", f"so 72.\n#### {answer}", "72").outcome is Outcome.CORRECT


def test_gsm8k_reads_every_minus_sign() -> None:
    for answer in ("-3", "−3", "–3", "－3", "-$3", "$-3", "−3.0"):
        assert grade_gsm8k("", f"#### {answer}", "-3").outcome is Outcome.CORRECT, answer
        assert grade_gsm8k("", f"#### {answer}", "3").outcome is Outcome.WRONG, answer
        assert grade_gsm8k("", "#### -3", answer).outcome is Outcome.CORRECT, answer


@pytest.mark.parametrize(
    "answer",
    [
        "5 million",
        "$5 thousand",
        "5k",
        "5 or 6",
        "5 to 6",
        "5–6",
        "5/2",
        r"5\times 3",
        r"5\frac{1}{2}",
        "5½",
        "5²",
        "5^2",
        "5:30",
        "5e3",
        "5_000",
        "--5",
        "5 000",
        "5 x 4 = 20",
        "5 plus 3",
        "5 minus three",
        "5 divided by 2",
        "5**3",
        "5·3",
        "5(3)",
        "5(3+4)",
        r"5\pi",
        r"5 \approx 6",
        r"5 \pm 1",
        r"5 \dfrac{1}{2}",
        r"5 \over 2",
        r"5 \cup 6",
        r"5 \text { or } 6",
        r"5 \textsf{ million}",
        r"5\sqrt{3}",
        "5√3",
        "5 ½",
        "$5K",
        "5 M",
        "5 and 6",
        "5 and a half",
        "5; 6",
        "5, 6",
        r"5\text{ or }6",
        r"5\text{ million}",
        "**5** million",
        "5--20",
        "5—20",
        "5 ~ 20",
        "5'11",
        "5 squared",
    ],
)
def test_gsm8k_does_not_read_the_beginning_of_another_number(answer: str) -> None:
    assert grade_gsm8k("", f"#### {answer}", "5").outcome is Outcome.UNPARSED


@pytest.mark.parametrize(
    "answer",
    [
        "5,000",
        "5{,}000",
        r"5\,000",
        r"5,\!000",
        "5'000",
        "5’000",
        "5\u202f000",
        "5\u2009000",
        "$5,000.00",
        "5,000, yes",
    ],
)
def test_gsm8k_reads_every_separator_of_thousands(answer: str) -> None:
    assert grade_gsm8k("", f"#### {answer}", "5000").outcome is Outcome.CORRECT
    assert grade_gsm8k("", "#### 5000", answer.removesuffix(", yes")).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "answer", ["1,5", "1,50", "1,5000", "1,234567", "1234,567", "1,234,5", "0,500", "1{,}5", r"1\,5", "1.5,5"]
)
def test_gsm8k_reads_no_number_with_other_groups(answer: str) -> None:
    assert grade_gsm8k("", f"#### {answer}", re.sub("[^0-9.]", "", answer)).outcome is Outcome.UNPARSED
    assert "not a number" in str(validate_gsm8k_gold(answer))


@pytest.mark.parametrize("gold", ["NaN", "None", "1e-05", "5 apples", "1/2", "about 5"])
def test_gsm8k_refuses_what_is_no_number(gold: str) -> None:
    assert "not a number" in str(validate_gsm8k_gold(gold))


def test_the_public_cases_are_graded_as_expected_but_for_the_listed_ones() -> None:
    if not PUBLIC_CASES.is_file():
        pytest.skip(f"{PUBLIC_CASES} is not on this machine")
    cases = [json.loads(line) for line in PUBLIC_CASES.read_text(encoding="utf-8").splitlines()]
    different = [
        str(case["id"])
        for case in cases
        if (RULES[case["rule"]].grade("", case["completion"], case["gold"]).outcome is Outcome.CORRECT)
        != case["expected"]
    ]
    assert different == list(NOT_AS_EXPECTED)
    assert len(cases) == 245
